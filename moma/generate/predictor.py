"""Prediction of the next tokens from the hidden vectors of a pass.

Shapes: see `model/layers.py`; P predicted positions of a pass, Q of all branches, C of a sequence,
R allowed ids.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moma.errors import UserError
from moma.generate.heads import DividedHead, HeadRows
from moma.generate.sampling import Sampler
from moma.generate.sequence import GeneratedSequence, Options
from moma.model.transformer import Transformer

# A sequence, and the row of its first branch in the batch.
_SequenceAndRow = tuple[GeneratedSequence, int]


class Predictor:
    """Samples the next tokens of sequences from the hidden vectors of a pass."""

    def __init__(self, model: Transformer, options: Options):
        self._head = DividedHead(model.head.weight, model.vocabulary)
        self._drafts = options.drafts
        image = options.image_sampling or options.sampling
        self._text, self._codes = Sampler(options.sampling), Sampler(image)
        if image.repetition_penalty != 1:
            self._drafts = 0

    def append_samples(self, sequences: Sequence[GeneratedSequence], hidden_BSD: Tensor) -> None:
        """Sample the next token of each sequence, and those after its drafts."""
        rows = [0]
        for each in sequences:
            rows.append(rows[-1] + len(each.feeds))
        placed = list(zip(sequences, rows, strict=False))
        groups = {
            codes: [each for each in placed if each[0].wants_codes == codes]
            for codes in (False, True)
        }
        for codes, group in groups.items():
            if group:
                self._sample(group, hidden_BSD, codes)

    def _sample(self, group: Sequence[_SequenceAndRow], hidden_BSD: Tensor, codes: bool) -> None:
        head, sampler = (self._head.codes, self._codes) if codes else (self._head.text, self._text)
        counts = [each.draft_count + 1 for each, _ in group]
        logits_PR = _combine_branches(head.logits(_gather(group, hidden_BSD)), group)
        head.forbid(logits_PR)
        if not codes:
            refused = [number for number, (each, _) in enumerate(group) if not each.may_begin_image]
            logits_PR[refused, self._head.begin_image] = -torch.inf
        _require_finite(logits_PR)
        noise_PR = history = None
        if sampler.sampling.temperature != 0:
            noise = [
                each.noise(offset, logits_PR.shape[1])
                for (each, _), count in zip(group, counts, strict=True)
                for offset in range(count)
            ]
            noise_PR = torch.stack(noise).to(logits_PR.device)
        if sampler.sampling.repetition_penalty != 1:
            history = [_history(each.tokens, head) for each, _ in group]
        index_P = sampler(logits_PR, noise_PR, history)
        ids = head.ids_R[index_P.cpu()].split(counts)
        for (each, _), own, logits_CR in zip(group, ids, logits_PR.split(counts), strict=True):
            each.append(own.tolist(), self._guesses(each, sampler, head, logits_CR))

    def _guesses(
        self, sequence: GeneratedSequence, sampler: Sampler, head: HeadRows, logits_CR: Tensor
    ) -> list[int]:
        """Guess the tokens after the last prediction, as if it held for them too."""
        count = min(self._drafts, len(logits_CR)) if sequence.wants_codes else 0
        if not count:
            return []
        logits_GR, noise_GR = logits_CR[-1:].expand(count, -1), None
        if sampler.sampling.temperature != 0:
            first, size = len(logits_CR), logits_CR.shape[1]
            noise = [sequence.noise(first + number, size) for number in range(count)]
            noise_GR = torch.stack(noise).to(logits_GR.device)
        return head.ids_R[sampler(logits_GR, noise_GR).cpu()].tolist()


def _gather(group: Sequence[_SequenceAndRow], hidden_BSD: Tensor) -> Tensor:
    """The hidden vectors to predict from, sequence by sequence and branch by branch, [Q, D]."""
    rows: list[int] = []
    columns: list[int] = []
    for each, first in group:
        for branch, feed in enumerate(each.feeds):
            last = range(len(feed) - 1 - each.draft_count, len(feed))
            columns += last
            rows += [first + branch] * len(last)
    index = torch.tensor([rows, columns], device=hidden_BSD.device)
    return hidden_BSD[index[0], index[1]]


def _combine_branches(logits_QR: Tensor, group: Sequence[_SequenceAndRow]) -> Tensor:
    """Sum the logits of each sequence's branches by their weights, [P, R]."""
    if all(len(each.feeds) == 1 for each, _ in group):
        return logits_QR
    parts, start = [], 0
    for each, _ in group:
        count = each.draft_count + 1
        branches = logits_QR[start : start + count * len(each.feeds)].unflatten(0, (-1, count))
        weights = torch.tensor(each.weights, device=logits_QR.device)
        parts.append((weights[:, None, None] * branches).sum(0))
        start += count * len(each.feeds)
    return torch.cat(parts)


def _history(tokens: Sequence[int], head: HeadRows) -> Tensor:
    index = head.index_of_id_V[torch.tensor(tokens, device=head.index_of_id_V.device)]
    return index[index >= 0]


def _require_finite(logits_PR: Tensor) -> None:
    if bool(logits_PR.isnan().any()):
        raise UserError(
            "the model's logits are NaN; its weights are damaged or its training failed"
        )
