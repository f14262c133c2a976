"""The cost of routing: feed-forwards with experts compared with ones without routing.

| variant | what runs on N tokens, half of them image tokens |
|---|---|
| `dense` | one SwiGLU |
| `floor` | eight experts, each on a contiguous eighth of the tokens: no routers, no gathers |
| `sequential`, `batched`, `grouped` | `moe_4t4i`, with these implementations |
| `triton` | another one, on a GPU only |
| `mod`, `mod_moe_…` | a depth router selects a quarter of the tokens for the experts (§2.3) |
| `…_floor` | the same experts on the first quarter, each on a contiguous part of it |

All have as many operations as `dense`, those with mixture-of-depths a quarter as many; the latter
are compared with `mod_floor` as their dense layer.
"""

import statistics
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from moma.bench.timing import Job, interleaved, seconds
from moma.model.architecture import ModelConfig
from moma.model.depth import DepthConfig, DepthRouter
from moma.model.dispatch import Dispatch, dispatch_for
from moma.model.experts import MixtureOfExperts
from moma.model.implementations import ImplementationName, build_experts, build_group
from moma.model.routing import Routing
from moma.progress import ProgressCallback, show_progress
from moma.runtime.peak import allocated_peak
from moma.runtime.sharding import DTYPES
from moma.runtime.world import can_compile, local_device

_SHARES = (0.5, 0.5)
# Architectures with mixture-of-depths, and the number of experts of their floors.
_WITH_DEPTH = {"mod": 1, "mod_moe_1t1i": 2, "mod_moe_4t4i": 8}
# Consecutive tokens of one modality, as many as an image has.
_RUN = 1024


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        dims: widths D; ffn is 4 · D, and the hidden width what a recipe's `model.dim` gives, two
            thirds of that, rounded up (Table 1 of MoMa).
        tokens: number of tokens N, a multiple of 32.
        repeats: rounds, in each of which every variant runs once.
        dtype: of weights and tokens, `fp32` or `bf16`.
        device: `cpu` or `cuda`; if omitted, the GPU if there is one.
        compiled: whether the variants run as compiled graphs, as `moma train` runs layers.
        cpu_time: whether to measure CPU time, summed over threads, instead of wall-clock time.
    """

    dims: tuple[int, ...] = (256, 512)
    tokens: int = 4096
    repeats: int = 31
    dtype: str = "fp32"
    device: str | None = None
    compiled: bool = True
    cpu_time: bool = False


def bench_layer(sizes: Sizes, quiet: bool = False) -> list[dict[str, Any]]:
    """Measure forward and backward of all variants at all widths.

    Returns:
        For each: `dim`, `ffn`, `variant`, median `milliseconds`, speed relative to floor and dense
        (above 1 is faster), `peak_bytes` beyond weights, their gradients and the tokens.
    """
    rounds = len(sizes.dims) * sizes.repeats
    with show_progress("bench layer", rounds, quiet) as report:
        return [
            record
            for index, dim in enumerate(sizes.dims)
            for record in _measure(
                dim, sizes, lambda n, note="", i=index: report(i * sizes.repeats + n, note)
            )
        ]


def _measure(dim: int, sizes: Sizes, report: ProgressCallback) -> list[dict[str, Any]]:
    device = torch.device(sizes.device) if sizes.device else local_device()
    torch.compiler.reset()  # graphs of another width count towards Dynamo's limit
    modules, timed, peaks = variants(dim, sizes.tokens, device), [], {}
    for name, module in modules.items():
        module.to(device, DTYPES[sizes.dtype])
        if sizes.compiled and can_compile(device):
            report(0, f"compiling {name}, width {dim}")
            module.compile(fullgraph=True, dynamic=False)
        job = training_job(module, dim, sizes, device)
        job()  # compiles; the weights have gradients from now on
        peaks[name] = allocated_peak(job, device)
        timed.append(partial(_seconds, job, module, device, sizes.cpu_time))
    times = interleaved(timed, sizes.repeats, report)
    median = dict(zip(modules, map(statistics.median, times), strict=True))

    def record(variant: str) -> dict[str, Any]:
        name = variant.removesuffix("_floor")
        floor, dense = (f"{name}_floor", "mod_floor") if name in _WITH_DEPTH else ("floor", "dense")
        return {
            "dim": dim,
            "ffn": 4 * dim,
            "variant": variant,
            "milliseconds": 1000 * median[variant],
            "ratio_to_floor": median[floor] / median[variant],
            "ratio_to_dense": median[dense] / median[variant],
            "peak_bytes": peaks[variant],
        }

    return list(map(record, modules))


def implementations(device: torch.device) -> list[ImplementationName]:
    """The implementations that differ on a device."""
    names: tuple[ImplementationName, ...] = get_args(ImplementationName)
    return [name for name in names if name != "triton" or device.type == "cuda"]


def variants(dim: int, tokens: int, device: torch.device) -> dict[str, nn.Module]:
    """Build the modules that are compared; they have the interface of `MixtureOfExperts`.

    Args:
        tokens: N, a multiple of 32, so that all experts process the same number.
    """
    dispatch = dispatch_for(device)
    hidden = ModelConfig(dim=dim, heads=1).hidden_width
    modules: dict[str, nn.Module] = {
        "dense": _experts("dense", dim, dispatch),
        "floor": ContiguousExperts(8, dim, hidden),
    }
    for implementation in implementations(device):
        modules[implementation] = _experts("moe_4t4i", dim, dispatch, implementation)
    for name, experts in _WITH_DEPTH.items():
        router = DepthRouter(dim, DepthConfig())
        floor = (
            _experts("dense", dim, dispatch)
            if experts == 1
            else ContiguousExperts(experts, dim, hidden)
        )
        modules[f"{name}_floor"] = FirstTokens(floor, int(router.factors[0] * tokens))
        modules[name] = DepthRouted(_experts(name, dim, dispatch), router, dispatch)
    torch.manual_seed(0)
    for parameter in chain.from_iterable(module.parameters() for module in modules.values()):
        nn.init.normal_(parameter, std=dim**-0.5)
    return modules


def _experts(
    name: str, dim: int, dispatch: Dispatch, implementation: ImplementationName | None = None
) -> MixtureOfExperts:
    """Build the feed-forward of an architecture, by default with its own implementation."""
    config = ModelConfig(groups=name, dim=dim, heads=1)
    fraction = config.depth_config.capacity_factor if config.depth_config else 1.0
    groups = [
        build_group(
            dim, config.hidden_width, group, _SHARES, token_fraction=fraction, dispatch=dispatch
        )
        for group in config.group_list
    ]
    return build_experts(groups, implementation or config.implementation)


class ContiguousExperts(nn.Module):
    """Experts that each process a contiguous part of the tokens, in one batched product."""

    def __init__(self, experts: int, dim: int, hidden: int):
        super().__init__()
        self.gate_EDF = nn.Parameter(torch.empty(experts, dim, hidden))
        self.up_EDF = nn.Parameter(torch.empty(experts, dim, hidden))
        self.down_EFD = nn.Parameter(torch.empty(experts, hidden, dim))

    def forward(self, x_1ND: Tensor, modality_1N: Tensor, routing: Routing) -> tuple[Tensor, None]:
        """Map [1, N, D] to [1, N, D]."""
        x_EKD = x_1ND[0].unflatten(0, (len(self.gate_EDF), -1))
        hidden_EKF = functional.silu(x_EKD @ self.gate_EDF) * (x_EKD @ self.up_EDF)
        return (hidden_EKF @ self.down_EFD).flatten(0, 1)[None], None


class FirstTokens(nn.Module):
    """A feed-forward that is added to the first K tokens; the others are left unchanged."""

    def __init__(self, feed_forward: nn.Module, tokens: int):
        super().__init__()
        self.feed_forward, self.tokens = feed_forward, tokens

    def forward(self, x_1ND: Tensor, modality_1N: Tensor, routing: Routing) -> tuple[Tensor, None]:
        """Map [1, N, D] to [1, N, D]."""
        first_1KD, rest_1ND = x_1ND[:, : self.tokens], x_1ND[:, self.tokens :]
        y_1KD, _ = self.feed_forward(first_1KD, modality_1N[:, : self.tokens], routing)
        return torch.cat((first_1KD + y_1KD, rest_1ND), dim=1), None


class DepthRouted(nn.Module):
    """Experts with mixture-of-depths: `DepthLayer` without its attention and norms."""

    def __init__(self, experts: MixtureOfExperts, router: DepthRouter, dispatch: Dispatch):
        super().__init__()
        self.experts, self.router, self.dispatch = experts, router, dispatch

    def forward(self, x_1ND: Tensor, modality_1N: Tensor, routing: Routing) -> tuple[Tensor, None]:
        """Map [1, N, D] to [1, N, D]."""
        (index_1K, filled_1K, weight_1K), _ = self.router(x_1ND, modality_1N >= 0, routing)
        x_ND, index_K = x_1ND[0], index_1K[0]
        modality_1K = modality_1N[:, index_K].masked_fill(~filled_1K, -1)
        slots = self.dispatch(index_K, filled_1K[0], torch.zeros_like(index_K), len(x_ND), 1)
        y_1KD, _ = self.experts(slots.gather(x_ND)[None], modality_1K, routing)
        update_KD = (y_1KD * weight_1K[..., None])[0]
        return slots.scatter_add(x_ND, update_KD.to(x_ND.dtype))[None], None


def training_job(module: nn.Module, dim: int, sizes: Sizes, device: torch.device) -> Job:
    """Return a job: forward and backward on tokens whose modality alternates in runs."""
    shape = (2, 1, sizes.tokens, dim)
    x_1ND, gradient_1ND = torch.randn(shape, device=device, dtype=DTYPES[sizes.dtype])
    x_1ND.requires_grad_()
    run = max(1, min(_RUN, sizes.tokens // 2))
    modality_1N = (torch.arange(sizes.tokens, device=device) // run % 2)[None]

    def job() -> None:
        x_1ND.grad = None
        module(x_1ND, modality_1N, Routing())[0].backward(gradient_1ND)

    return job


def _seconds(job: Job, module: nn.Module, device: torch.device, cpu_time: bool) -> float:
    module.zero_grad()  # so that the job allocates gradients, as in a training step
    return seconds(job, cpu_time, device)
