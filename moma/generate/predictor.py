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
from moma.generate.sequence import GeneratedSequence
from moma.model.transformer import Transformer

# A sequence, and the row of its first branch in the batch.
_SequenceAndRow = tuple[GeneratedSequence, int]
# A sequence, and the logits of its next token and of those after its drafts, [C, R].
_SequenceAndLogits = tuple[GeneratedSequence, Tensor]


class Predictor:
    """Samples the next tokens of sequences from the hidden vectors of a pass."""

    def __init__(self, model: Transformer):
        self._head = DividedHead(model.head.weight, model.vocabulary)

    def append_samples(self, sequences: Sequence[GeneratedSequence], hidden_BSD: Tensor) -> None:
        """Sample the next token of each sequence, and those after its drafts.

        A sequence whose logits are NaN or infinite ends with an error; of ids that are not
        allowed they are −∞.
        """
        groups: dict[bool, list[_SequenceAndRow]] = {False: [], True: []}
        row = 0
        for each in sequences:
            groups[each.wants_codes].append((each, row))
            row += len(each.inputs)
        for codes, group in groups.items():
            if group:
                self._sample(group, hidden_BSD, codes)

    def _sample(self, group: Sequence[_SequenceAndRow], hidden_BSD: Tensor, codes: bool) -> None:
        head = self._head.codes if codes else self._head.text
        logits_PR = _combine_branches(head.logits(_gather(group, hidden_BSD)), group)
        head.forbid(logits_PR)
        if not codes:
            refused = [number for number, (each, _) in enumerate(group) if not each.may_begin_image]
            if refused:
                logits_PR[refused, self._head.begin_image] = -torch.inf
        sequences = [each for each, _ in group]
        counts = [each.draft_count + 1 for each in sequences]
        logits_PR = _end_without_numbers(sequences, counts, logits_PR)
        alike: dict[Sampler, list[_SequenceAndLogits]] = {}
        for each, logits_CR in zip(sequences, logits_PR.split(counts), strict=True):
            alike.setdefault(each.sampler, []).append((each, logits_CR))
        for sampler, own in alike.items():
            own_PR = logits_PR if len(alike) == 1 else torch.cat([logits for _, logits in own])
            _append(own, own_PR, sampler, head)


def _end_without_numbers(
    sequences: Sequence[GeneratedSequence], counts: Sequence[int], logits_PR: Tensor
) -> Tensor:
    """End sequences whose logits are NaN or +∞, and return the logits with 0 in their place."""
    is_bad_P = ~logits_PR.amax(-1).isfinite()
    if not bool(is_bad_P.any()):
        return logits_PR
    for each, is_bad_C in zip(sequences, is_bad_P.split(counts), strict=True):
        if bool(is_bad_C.any()):
            each.end = UserError(
                "the model's logits are NaN or infinite; its weights are damaged, its training "
                "failed or the guidance is too strong"
            )
    return logits_PR.masked_fill(is_bad_P[:, None], 0)


def _append(
    group: Sequence[_SequenceAndLogits], logits_PR: Tensor, sampler: Sampler, head: HeadRows
) -> None:
    """Append samples to sequences that are sampled alike."""
    noise_PR = history = None
    if sampler.sampling.temperature != 0:
        noise = [
            each.noise(offset, logits_PR.shape[1])
            for each, logits_CR in group
            for offset in range(len(logits_CR))
        ]
        noise_PR = torch.stack(noise).to(logits_PR.device)
    if sampler.sampling.repetition_penalty != 1:
        history = [_history(each.tokens, head) for each, _ in group]
    index_P = sampler(logits_PR, noise_PR, history)
    ids = head.ids_R[index_P.cpu()].split([len(logits_CR) for _, logits_CR in group])
    for (each, logits_CR), own in zip(group, ids, strict=True):
        each.append(own.tolist(), _guesses(each, sampler, head, logits_CR))


def _guesses(
    sequence: GeneratedSequence, sampler: Sampler, head: HeadRows, logits_CR: Tensor
) -> list[int]:
    """Guess the tokens after the last prediction, as if it held for them too."""
    count = min(sequence.max_drafts, len(logits_CR))
    if count <= 0:
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
        for branch, input_ids in enumerate(each.inputs):
            last = range(len(input_ids) - 1 - each.draft_count, len(input_ids))
            columns += last
            rows += [first + branch] * len(last)
    if len(rows) == hidden_BSD.shape[:2].numel():
        return hidden_BSD.flatten(0, 1)
    index = torch.tensor([rows, columns], device=hidden_BSD.device)
    return hidden_BSD[index[0], index[1]]


def _combine_branches(logits_QR: Tensor, group: Sequence[_SequenceAndRow]) -> Tensor:
    """Sum the logits of each sequence's branches by their weights, [P, R]."""
    if all(len(each.inputs) == 1 for each, _ in group):
        return logits_QR
    parts, start = [], 0
    for each, _ in group:
        count = each.draft_count + 1
        branches = logits_QR[start : start + count * len(each.inputs)].unflatten(0, (-1, count))
        weights = torch.tensor(each.weights, device=logits_QR.device)
        parts.append((weights[:, None, None] * branches).sum(0))
        start += count * len(each.inputs)
    return torch.cat(parts)


def _history(tokens: Sequence[int], head: HeadRows) -> Tensor:
    index = head.index_of_id_V[torch.tensor(tokens, device=head.index_of_id_V.device)]
    return index[index >= 0]
