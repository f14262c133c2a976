"""A run as a model of the lm-evaluation-harness (`pip install 'moma[lm-eval]'`).

    python -m moma.evaluate.harness --model moma --model_args run=runs/my --tasks piqa

This is the harness's own command line, which knows only its own models, with `moma` added.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import warning_once

from moma.errors import UserError
from moma.evaluate.score import ScoredSequence, score, windows, with_target
from moma.generate.decode import decode
from moma.generate.mixed import MixedModel
from moma.generate.sampling import Sampling
from moma.generate.sequence import Branch, Options, Request
from moma.generate.stream import StopStrings
from moma.model.decoding import prepare_decoding
from moma.model.routing import RoutingName
from moma.runs import Run
from moma.runtime.world import World, gather, join_world, local_device
from moma.tokenizers.text import encode_text
from moma.train.restore import load_run, require_routing

logger = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SETTINGS = ("until", "max_gen_toks", "do_sample", *_SAMPLING)


@register_model("moma")
class MomaLM(TemplateLM):
    """A run's model under causal routing; scores are those of `moma evaluate`.

    Attributes:
        world: the ranks, each with the whole model, which share the requests.
    """

    world = World(local_device())

    def __init__(
        self,
        run: str,
        routing: RoutingName = "causal",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Load the run.

        Args:
            routing: see `Transformer.named_routing`; generation under `choice` is that of `causal`.
            batch_size: number of texts to generate at once; scoring batches by number of tokens,
                at most those of a micro-batch of the run.
            max_batch_size, device: what the harness passes, by default `cuda:0`; not used: the
                device is this rank's GPU, or the CPU if there is none.

        Raises:
            UserError: the folder is not a run, has no checkpoint, or cannot use the routing.
        """
        super().__init__()
        self._device = local_device()
        self._rank, self._world_size = self.world.rank, self.world.size
        folder = Run(Path(run))
        model, recipe = load_run(folder)
        require_routing(folder, model, routing)
        if routing != "choice" and routing != "causal":  # choice cannot generate
            model.causal_routing = model.named_routing(routing)
        prepare_decoding(model)
        data = recipe.data
        self._mixed = MixedModel.assemble(model, folder.tokenizers, data.sequence_length)
        self._routing, self._max_tokens = routing, data.micro_batch_size * data.sequence_length
        self._batch = 1 if isinstance(batch_size, str) else batch_size
        self._name = str(folder.path.resolve())

    @property
    def eot_token_id(self) -> int:
        """Id that ends a document."""
        return self._mixed.model.vocabulary.end

    @property
    def prefix_token_id(self) -> int:
        """Id that begins a document."""
        return self._mixed.model.vocabulary.beginning

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in caches of requests."""
        return self._name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text, after the beginning of a document unless it is not wanted."""
        ids = encode_text(self._mixed.tokenizer, string)
        return ids if add_special_tokens is False else [self.prefix_token_id, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        sequences = [self._cut(prompt, target) for _, prompt, target in requests]
        return [
            (float(each.log_likelihood_T.sum()), bool(each.is_top_T.all()))
            for each in self._score(sequences)
        ]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each text, in windows as `moma evaluate --suite perplexity`."""
        vocabulary, context = self._mixed.model.vocabulary, self._mixed.context
        texts = [torch.tensor(self.tok_encode(request.args[0])).numpy() for request in requests]
        parts = [windows(ids, context, vocabulary) for ids in texts]
        scores = iter(self._score([window for own in parts for window in own]))
        return [
            sum((float(next(scores).log_likelihood_T.sum()) for _ in own), 0.0) for own in parts
        ]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each text until one of its stop strings, or the end of the document.

        At most half of the context is generated.

        Raises:
            UserError: a task has a generation setting that is not supported.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        answers = [""] * len(requests)
        for indices in groups.values():
            prompts = [requests[index].args[0] for index in indices]
            found = self._generate(prompts, requests[indices[0]].args[1])
            for index, answer in zip(indices, found, strict=True):
                answers[index] = answer
        return answers

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, stacked."""
        return torch.stack(gather(tensor.cpu(), self.world.writers))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all ranks, on one of them."""
        objects = gather(obj, self.world.writers)
        return objects if self.world.rank == dst else None

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.world.barrier()

    def _score(self, sequences: Sequence[ScoredSequence]) -> list[Any]:
        return score(self._mixed.model, sequences, self._max_tokens, self._routing)

    def _cut(self, prompt: list[int], target: list[int]) -> ScoredSequence:
        """A prompt, without its beginning if it is too long, and its target."""
        if len(target) > self._mixed.context:
            raise UserError(
                f"a continuation has {len(target)} tokens, and the model reads at most "
                f"{self._mixed.context}; leave the task out"
            )
        excess = max(0, len(prompt) + len(target) - self._mixed.context - 1)
        return with_target(prompt[excess:], target)

    def _new_tokens(self, wanted: int) -> int:
        most = self._mixed.context // 2
        if wanted > most and self.world.rank == 0:
            warning_once(
                logger,
                f"max_gen_toks {wanted}: generating at most {most} tokens, half of the context; "
                "longer answers are cut off",
            )
        return min(wanted, most)

    def _generate(self, prompts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        mixed, vocabulary = self._mixed, self._mixed.model.vocabulary
        values: Any = normalize_gen_kwargs(settings)
        if unknown := [name for name in values if name not in _SETTINGS]:
            raise UserError(
                f"generation_kwargs: {', '.join(unknown)}: not supported; use "
                f"{', '.join(_SETTINGS)}, or leave the task out"
            )
        new_tokens = self._new_tokens(values["max_gen_toks"])
        stops = [each for each in values["until"] if each]
        sampling: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0}
        sampling |= {name: values[name] for name in _SAMPLING if name in values}
        options = Options(
            "text",
            mixed.context,
            new_tokens,
            Sampling(**sampling),
            stop=StopStrings(mixed.tokenizer, vocabulary, stops) if stops else None,
        )

        def requests() -> Iterator[tuple[int, Request]]:
            kept = mixed.context - new_tokens - 1
            for number, prompt in enumerate(prompts):
                ids = self.tok_encode(prompt, add_special_tokens=False)
                ids = ids[max(0, len(ids) - kept) :]
                yield number, Request([Branch([vocabulary.beginning, *ids])], options, number)

        answers: list[list[int]] = [[] for _ in prompts]
        for number, tokens, _ in decode(mixed.model, requests(), self._batch):
            answers[number] += tokens
        return ["".join(map(str, mixed.decode(answer, stops))) for answer in answers]


def main() -> None:
    """Run the harness's command line, on one rank or, under `torchrun`, many."""
    try:
        with join_world() as world:
            MomaLM.world = world
            cli_evaluate()
    except UserError as error:
        print(f"moma: {error}", file=sys.stderr)
        sys.exit(error.CODE)


if __name__ == "__main__":
    main()
