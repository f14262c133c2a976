"""What routing costs: a feed-forward of experts compared with one that routes nothing.

    for each width, rounds of all variants:  forward + backward  → median milliseconds
    for each variant, once:                  forward + backward  → peak memory

| variant | what runs on N tokens, half of them image tokens |
|---|---|
| `dense` | one SwiGLU |
| `floor` | eight experts, each on a contiguous eighth of the tokens: no routers, no gathers |
| `sequential`, `batched`, `grouped` | `moe_4t4i`, with these implementations |
| `mod`, `mod_moe_…` | a gate selects a quarter of the tokens for the experts (§2.3) |
| `…_floor` | the same experts on the first quarter, each on a contiguous part of it |

All have the operations of `dense`; behind a gate a quarter of them, so those are compared with
`mod_floor` as the dense layer.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from moma.bench.timing import Job, clock_of, interleaved, seconds
from moma.model.architecture import ModelConfig
from moma.model.depth import DepthConfig, DepthRouter
from moma.model.experts import MixtureOfExperts, build_group
from moma.model.groups import named_groups
from moma.model.implementations import ImplementationName, build_experts
from moma.model.layers import SwiGLU, gather, scatter_add
from moma.model.routing import Routing
from moma.progress import ProgressCallback, show_progress
from moma.runtime.peak import allocated_peak
from moma.runtime.world import can_compile, local_device

SHARES, RUN = (0.5, 0.5), 1024
STRATEGIES: tuple[ImplementationName, ...] = get_args(ImplementationName)
GATED = ("mod", "mod_moe_1t1i", "mod_moe_4t4i")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        dims: widths D; ffn is 4 · D, and the hidden width what a recipe's `model.dim` gives, two
            thirds of that, rounded up (Table 1 of MoMa).
        tokens: N.
        repeats: rounds, in each of which every variant runs once.
        dtype: of weights and tokens, `fp32` or `bf16`.
        device: `cpu` or `cuda`; left out, the GPU if there is one.
        compiled: whether the variants run as compiled graphs, as `moma train` runs layers.
        cpu_time: whether processor time is measured, which leaves out other processes and adds up
            threads.
    """

    dims: tuple[int, ...] = (256, 512)
    tokens: int = 4096
    repeats: int = 31
    dtype: str = "fp32"
    device: str | None = None
    compiled: bool = True
    cpu_time: bool = False


def bench_layer(sizes: Sizes, quiet: bool = False) -> list[dict[str, Any]]:
    """Measure all variants at all widths.

    Args:
        sizes: what is measured.
        quiet: whether progress is not shown.

    Returns:
        For each: `dim`, `ffn`, `variant`, median `milliseconds`, speed against floor and dense
        (above 1 is faster), `peak_bytes` beyond weights, their gradients and the tokens.
    """
    rounds = len(sizes.dims) * sizes.repeats
    with show_progress("bench layer", rounds, quiet) as report:
        return [
            row
            for index, dim in enumerate(sizes.dims)
            for row in _rows(dim, sizes, lambda done, i=index: report(i * sizes.repeats + done))
        ]


def _rows(dim: int, sizes: Sizes, report: ProgressCallback) -> list[dict[str, Any]]:
    device = torch.device(sizes.device) if sizes.device else local_device()
    modules = variants(dim, sizes.tokens)
    jobs = {}
    for name, module in modules.items():
        module.to(device, DTYPES[sizes.dtype])
        if sizes.compiled and can_compile(device):
            module.compile(fullgraph=True)
        jobs[name] = _job(module, dim, sizes, device)
    peaks = {}
    for name, job in jobs.items():
        job()  # weights have gradients from here on
        peaks[name] = allocated_peak(job, device)
    timed = [
        partial(_timed, job, modules[name], device, sizes.cpu_time) for name, job in jobs.items()
    ]
    taken = dict(zip(jobs, interleaved(timed, sizes.repeats, report), strict=True))
    median = {name: statistics.median(values) for name, values in taken.items()}
    return [
        {
            "dim": dim,
            "ffn": 4 * dim,
            "variant": name,
            "milliseconds": 1000 * median[name],
            "ratio_to_floor": median[_floor_of(name)] / median[name],
            "ratio_to_dense": median[_dense_of(name)] / median[name],
            "peak_bytes": peaks[name],
        }
        for name in jobs
    ]


def variants(dim: int, tokens: int) -> dict[str, nn.Module]:
    """The modules that are compared, from [1, N, D] and modality [1, N] to [1, N, D].

    Args:
        dim: width D.
        tokens: N, a multiple of 32, so that all experts take equally many.
    """
    hidden = ModelConfig(dim=dim, heads=1).hidden_width
    modules: dict[str, nn.Module] = {
        "dense": Slices(SwiGLU(dim, hidden)),
        "floor": Slices(Stack(8, dim, hidden)),
    }
    for run in STRATEGIES:
        modules[run] = Chosen(_experts("moe_4t4i", dim, hidden, run))
    floors = (SwiGLU(dim, hidden), Stack(2, dim, hidden), Stack(8, dim, hidden))
    for name, floor in zip(GATED, floors, strict=True):
        run = ModelConfig(groups=name).implementation
        gate = DepthRouter(dim, DepthConfig())
        modules[f"{name}_floor"] = FirstSlices(floor, int(gate.capacity_factor * tokens))
        modules[name] = Gated(_experts(name, dim, hidden, run, gate.capacity_factor), gate)
    torch.manual_seed(0)
    for parameter in chain.from_iterable(module.parameters() for module in modules.values()):
        nn.init.normal_(parameter, std=dim**-0.5)
    return modules


def _experts(
    name: str, dim: int, hidden: int, run: ImplementationName, token_fraction: float = 1.0
) -> MixtureOfExperts:
    groups = [
        build_group(dim, hidden, g, SHARES, token_fraction=token_fraction)
        for g in named_groups(name)
    ]
    return build_experts(groups, run)


class Stack(nn.Module):
    """Experts, each on a contiguous part of the tokens, in one batched product."""

    def __init__(self, experts: int, dim: int, hidden: int):
        super().__init__()
        self.gate_EDF = nn.Parameter(torch.empty(experts, dim, hidden))
        self.up_EDF = nn.Parameter(torch.empty(experts, dim, hidden))
        self.down_EFD = nn.Parameter(torch.empty(experts, hidden, dim))

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map [N, D] to [N, D]."""
        x_EKD = x_ND.unflatten(0, (len(self.gate_EDF), -1))
        hidden_EKF = functional.silu(x_EKD @ self.gate_EDF) * (x_EKD @ self.up_EDF)
        return (hidden_EKF @ self.down_EFD).flatten(0, 1)


class Slices(nn.Module):
    """A feed-forward of all tokens, in their order."""

    def __init__(self, feed: nn.Module):
        super().__init__()
        self.feed = feed

    def forward(self, x_1ND: Tensor, modality_1N: Tensor) -> Tensor:
        """Map [1, N, D] to [1, N, D]."""
        return self.feed(x_1ND[0])[None]


class FirstSlices(nn.Module):
    """A feed-forward that is added to the first K tokens; the others are unchanged."""

    def __init__(self, feed: nn.Module, chosen: int):
        super().__init__()
        self.feed, self.chosen = feed, chosen

    def forward(self, x_1ND: Tensor, modality_1N: Tensor) -> Tensor:
        """Map [1, N, D] to [1, N, D]."""
        first_KD, rest_ND = x_1ND[0, : self.chosen], x_1ND[0, self.chosen :]
        return torch.cat((first_KD + self.feed(first_KD), rest_ND))[None]


class Chosen(nn.Module):
    """Experts that route all tokens."""

    def __init__(self, experts: MixtureOfExperts):
        super().__init__()
        self.experts = experts

    def forward(self, x_1ND: Tensor, modality_1N: Tensor) -> Tensor:
        """Map [1, N, D] to [1, N, D]."""
        return self.experts(x_1ND, modality_1N, Routing())[0]


class Gated(nn.Module):
    """Experts behind a gate: `DepthLayer` without its attention and norms."""

    def __init__(self, experts: MixtureOfExperts, gate: DepthRouter):
        super().__init__()
        self.experts, self.gate = experts, gate

    def forward(self, x_1ND: Tensor, modality_1N: Tensor) -> Tensor:
        """Map [1, N, D] to [1, N, D]."""
        (token_1K, taken_1K, weight_1K), _ = self.gate(x_1ND, modality_1N >= 0, Routing())
        token_K = token_1K[0]
        modality_1K = modality_1N[:, token_K].masked_fill(~taken_1K, -1)
        fed_1KD, _ = self.experts(gather(x_1ND[0], token_K)[None], modality_1K, Routing())
        update_KD = (fed_1KD * weight_1K[..., None])[0]
        return scatter_add(x_1ND[0], token_K, update_KD.to(x_1ND.dtype))[None]


def _job(module: nn.Module, dim: int, sizes: Sizes, device: torch.device) -> Callable[[], None]:
    """Forward and backward on tokens in runs of one modality, like those of images."""
    dtype = DTYPES[sizes.dtype]
    shape = (1, sizes.tokens, dim)
    x_1ND, gradient_1ND = torch.randn(2, *shape, device=device, dtype=dtype)
    x_1ND.requires_grad_()
    runs = max(1, min(RUN, sizes.tokens // 2))
    modality_1N = (torch.arange(sizes.tokens, device=device) // runs % 2)[None]

    def job() -> None:
        x_1ND.grad = None
        module(x_1ND, modality_1N).backward(gradient_1ND)

    return job


def _timed(job: Job, module: nn.Module, device: torch.device, cpu_time: bool) -> float:
    """Seconds of a job; gradients are allocated inside, as in a training step."""
    module.zero_grad()
    return seconds(job, clock_of(cpu_time), device)


def _floor_of(variant: str) -> str:
    name = variant.removesuffix("_floor")
    return f"{name}_floor" if name in GATED else "floor"


def _dense_of(variant: str) -> str:
    return "mod_floor" if variant.removesuffix("_floor") in GATED else "dense"
