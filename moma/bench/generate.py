"""Speed of generation, beside `transformers` and beside the limit that memory bandwidth sets.

| variant | what generates |
|---|---|
| `transformers` | its `generate`, on a Chameleon of the shape of `dense` |
| `dense`, `moe_4t4i`, … | `moma.generate.decode.decode` |
| `dense+drafts`, … | the same with drafts of image codes |

Models have random weights, prompts random ids and equal lengths; sampling is Chameleon's. The port
of Chameleon in `transformers` masks image codes, so it generates as many other tokens in place of
an image, at the same cost. Routing is by thresholds that select as many tokens as in training.
Codes of random models depend little on each other, so that many drafts are right: drafts show what
a pass costs, not how many a trained model saves.

The limit is the time to read from memory what a pass over one token per sequence has to read: the
weights that these tokens use, and the cached keys and values.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from moma.bench.synthetic import synthetic_vocabulary
from moma.bench.timing import interleaved, median_ratio, seconds
from moma.generate.decode import decode
from moma.generate.sampling import Sampling
from moma.generate.sequence import Branch, Options, Request
from moma.hub.chameleon_format import (
    chameleon_names,
    port_config,
    require_expressible,
    small_vq_config,
)
from moma.model.architecture import ModelConfig
from moma.model.decoding import prepare_decoding
from moma.model.dispatch import dispatch_for
from moma.model.flops import ModelCounts, sum_over_kinds
from moma.model.transformer import Transformer, no_head
from moma.progress import show_progress
from moma.runtime.sharding import DTYPES
from moma.runtime.world import local_device
from moma.train.recipe import Recipe
from moma.vocabulary import Vocabulary

_PROMPT = 16
_WARM_UP = 4
# Longer than all that is generated.
_CONTEXT = 2**20
# Tokens of each modality that determine thresholds: sequences, and tokens of each.
_CALIBRATION = (8, 128)
# A read is timed this often in a row, since one may take only milliseconds.
_READS = 5

GenerationMode = Literal["text", "image"]
HeadRows = Mapping[GenerationMode, int]


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        batches: numbers of sequences that are generated together.
        modes: `text`, `image` or both.
        tokens: number of new tokens of a text; an image has its own number.
        drafts: image codes to guess per pass, measured in addition to none; 0: not measured.
        repeats: rounds, in each of which everything runs once.
        dtype: of weights and caches, `fp32` or `bf16`.
        device: `cpu` or `cuda`; if omitted, the GPU if there is one.
        cpu_time: whether to measure CPU time, summed over threads, instead of wall-clock time.
        graphs: whether moma may use CUDA graphs.
    """

    batches: tuple[int, ...] = (1, 8)
    modes: tuple[GenerationMode, ...] = ("text", "image")
    tokens: int = 64
    drafts: int = 0
    repeats: int = 3
    dtype: str = "fp32"
    device: str | None = None
    cpu_time: bool = False
    graphs: bool = True


class Variant(NamedTuple):
    """A model that generates.

    Attributes:
        name: what the records call it.
        model: it is called once for each pass.
        run: continues prompts, [B, S], in a mode by a number of tokens; returns how many new tokens
            there are in all sequences.
        head_rows: number of ids whose logits a mode needs, for the modes that it is measured in.
    """

    name: str
    config: ModelConfig
    vocabulary: Vocabulary
    model: nn.Module
    run: Callable[[Tensor, GenerationMode, int], int]
    head_rows: HeadRows


def bench_generate(
    recipes: Mapping[str, Recipe], sizes: Sizes, quiet: bool = False
) -> list[dict[str, Any]]:
    """Measure models in interleaved rounds.

    Args:
        recipes: by name; `transformers` gets the shape of the first, a dense model.

    Returns:
        A record for each variant, batch and mode, with the keys that `docs/bench.md` lists.

    Raises:
        UserError: `transformers` has no model of that shape.
    """
    torch.manual_seed(0)
    device = torch.device(sizes.device) if sizes.device else local_device()
    variants = _variants(recipes, sizes, device)
    cases = [
        _Case(variant, batch, mode, sizes, device)
        for batch in sizes.batches
        for mode in sizes.modes
        for variant in variants
        if mode in variant.head_rows
    ]
    timed = [job for case in cases for job in (case.time_generation, case.time_reads)]
    with show_progress("rounds", sizes.repeats, quiet) as report:
        times = iter(interleaved(timed, sizes.repeats, report))
    found = [
        (case, [case.tokens / each for each in own], [_READS * case.batch / each for each in reads])
        for case, own, reads in zip(cases, times, times, strict=True)
    ]
    baseline = {
        (case.batch, case.mode): speeds for case, speeds, _ in found if case.variant is variants[0]
    }
    return [
        {
            "variant": case.variant.name,
            "batch": case.batch,
            "mode": case.mode,
            "tokens_per_second": statistics.median(speeds),
            "ratio_to_transformers": median_ratio(speeds, baseline[case.batch, case.mode]),
            "ratio_to_limit": median_ratio(speeds, limits),
            "passes_per_image": case.passes if case.mode == "image" else None,
        }
        for case, speeds, limits in found
    ]


def _variants(recipes: Mapping[str, Recipe], sizes: Sizes, device: torch.device) -> list[Variant]:
    """What is measured: first `transformers`, then each recipe's model, and it with drafts."""
    dtype, dense = DTYPES[sizes.dtype], next(iter(recipes.values()))
    vocabulary = synthetic_vocabulary(dense)
    variants = [transformers_variant(dense.model, vocabulary, device, dtype)]
    for name, recipe in recipes.items():
        model = random_model(recipe.model, vocabulary, device, dtype, sizes.graphs)
        variants.append(moma_variant(name, model))
        if sizes.drafts:
            variants.append(moma_variant(f"{name}+drafts", model, sizes.drafts))
    return variants


class _Case:
    """A variant that continues a batch of prompts in one mode.

    Attributes:
        tokens, passes: number of new tokens and of passes of the last generation.
    """

    def __init__(
        self,
        variant: Variant,
        batch: int,
        mode: GenerationMode,
        sizes: Sizes,
        device: torch.device,
    ):
        self.variant, self.batch, self.mode, self._device = variant, batch, mode, device
        self._cpu_time = sizes.cpu_time
        vocabulary, dim = variant.vocabulary, variant.config.dim
        self._new = vocabulary.image_span if mode == "image" else sizes.tokens
        shape, first = (batch, _PROMPT), max(vocabulary.image_codes) + 1
        self._prompts_BS = torch.randint(first, vocabulary.size, shape, device=device)
        self._prompts_BS[:, 0] = vocabulary.beginning
        self.tokens = self.passes = 0
        read = bytes_per_pass(variant, mode, batch, _PROMPT + self._new // 2, sizes.dtype)
        self._read_rows = -(-read // (4 * dim))
        variant.run(self._prompts_BS, mode, _WARM_UP)

    def time_generation(self) -> float:
        """Measure a generation, in seconds."""
        passes: list[None] = []
        hook = self.variant.model.register_forward_pre_hook(lambda *_: passes.append(None))

        def job() -> None:
            self.tokens = self.variant.run(self._prompts_BS, self.mode, self._new)

        found = seconds(job, self._cpu_time, self._device)
        hook.remove()
        self.passes = len(passes)
        return found

    def time_reads(self) -> float:
        """Measure reading as many bytes as a pass has to read, `_READS` times, in seconds."""
        dim = self.variant.config.dim
        # Stored like the weights of `cpu_decoding.py`, which is the fastest order.
        read_DR = torch.ones(dim, self._read_rows, device=self._device)
        x_1D = torch.ones(1, dim, device=self._device)

        def job() -> None:
            for _ in range(_READS):
                torch.mm(x_1D, read_DR)

        return seconds(job, self._cpu_time, self._device)


def bytes_per_pass(
    variant: Variant, mode: GenerationMode, batch: int, length: int, dtype: str
) -> int:
    """Return how many bytes a pass over one token of each sequence has to read, on average.

    That is the weights that at least one of the tokens uses, without auxiliary routers, and the
    cached keys and values.

    Args:
        mode: determines the modality of the tokens and the rows of the head.
        length: number of cached tokens of each.
    """
    config = variant.config
    shares = [float(name == mode) for name in variant.vocabulary.modalities]
    counts = ModelCounts(config, variant.vocabulary.size, shares, batch, 1)
    weights = counts.active_parameters(tokens=batch)
    weights["outside"] = {"norms": config.dim, "head": variant.head_rows[mode] * config.dim}
    depth, num_mod = config.depth_config, len(config.depth_layers)
    layers = config.layers - num_mod + (depth.token_fraction(shares) * num_mod if depth else 0)
    cached = 2 * batch * length * layers * counts.key_width
    return round(DTYPES[dtype].itemsize * (sum(sum_over_kinds(weights).values()) + cached))


def moma_variant(name: str, model: Transformer, drafts: int = 0) -> Variant:
    """Return a variant that generates with moma; with drafts, only images."""
    vocabulary = model.vocabulary

    def run(prompts_BS: Tensor, mode: GenerationMode, tokens: int) -> int:
        options = Options(mode, _CONTEXT, tokens, Sampling(), drafts=drafts)
        requests = [
            Request([Branch(ids)], options, seed) for seed, ids in enumerate(prompts_BS.tolist())
        ]
        return sum(len(each.tokens) for each in decode(model, enumerate(requests)))

    codes = len(vocabulary.image_codes)
    head_rows: dict[GenerationMode, int] = {"image": codes}
    if not drafts:
        head_rows["text"] = vocabulary.size - codes
    return Variant(name, model.config, vocabulary, model, run, head_rows)


def transformers_variant(
    config: ModelConfig, vocabulary: Vocabulary, device: torch.device, dtype: torch.dtype
) -> Variant:
    """Return a variant that generates with `transformers`, of the shape of a dense model.

    Raises:
        UserError: Chameleon has no such model.
    """
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    require_expressible(config, "transformers")
    names = {name: id_ for id_, name in chameleon_names({}, vocabulary).items()}
    images, sampling = small_vq_config(vocabulary), Sampling()
    values = port_config(config, vocabulary, names, _CONTEXT, "float32", images)
    model = ChameleonForConditionalGeneration(ChameleonConfig(**values)).eval().to(device, dtype)

    def run(prompts_BS: Tensor, mode: GenerationMode, tokens: int) -> int:
        output_BS = model.generate(
            prompts_BS,
            attention_mask=torch.ones_like(prompts_BS),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
        )
        return output_BS[:, prompts_BS.shape[1] :].numel()

    head_rows: HeadRows = {"text": vocabulary.size, "image": vocabulary.size}
    return Variant("transformers", config, vocabulary, model, run, head_rows)


def random_model(
    config: ModelConfig,
    vocabulary: Vocabulary,
    device: torch.device,
    dtype: torch.dtype,
    graphs: bool = True,
) -> Transformer:
    """Build a model with random weights, and thresholds by which it selects the usual shares.

    That is 1/E of the tokens for each of the E experts of a group, and the capacity factor of a
    depth router.
    """
    shares = [1 / len(vocabulary.modalities)] * len(vocabulary.modalities)
    with device:
        model = Transformer(config, vocabulary, shares, dispatch=dispatch_for(device))
    model.initialize(seed=0)
    model.eval().requires_grad_(False)
    for number in range(config.layers):
        # The tokens of a sequence would choose alike if they had much context in common.
        model.get_parameter(f"layers.{number}.attention.output.weight").zero_()
    if config.has_expert_choice:
        codes = torch.tensor(vocabulary.image_codes)
        first = int(codes.max()) + 1
        tokens_2BS = torch.stack(
            (
                torch.randint(first, vocabulary.size, _CALIBRATION),
                codes[torch.randint(len(codes), _CALIBRATION)],
            )
        )
        routing = model.named_routing("choice")
        cutoff_P = torch.cat(
            model(tokens_2BS.flatten(0, 1).to(device), None, None, routing, no_head).cutoffs
        )
        model.update_cutoffs(torch.stack((cutoff_P, torch.ones_like(cutoff_P))))
    prepare_decoding(model.to(dtype), graphs)
    return model
