"""Optimizers with the paper's hyperparameters, and the learning-rate schedule."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from moma.recipe import Config
from moma.runtime.muon import Muon


class OptimizerConfig(Config):
    """An optimizer and its schedule; by default those of the paper.

    Learning rate and schedule are those of MoMa (Table 5), AdamW's other values those of Chameleon
    (arXiv 2405.09818 §2.3).

    Attributes:
        algorithm: `adamw`; or `muon` for the matrices of attention and experts, and AdamW for all
            other parameters. Both use the same learning rate and weight decay.
        learning_rate: peak learning rate.
        warmup: steps over which the learning rate rises linearly to the peak.
        schedule: decay after the warm-up: `linear` or `cosine` up to the last step, or `wsd`
            (warm-up, stable, decay): linear during the last `decay_steps` steps.
        decay_steps: steps of the decay of `wsd`.
        final_ratio: learning rate of the last step, as a fraction of the peak.
        beta1: AdamW's decay of the mean of the gradient.
        beta2: AdamW's decay of the mean of the squared gradient.
        epsilon: added to the denominator of AdamW's update.
        momentum: Muon's decay of the mean of the gradient.
        weight_decay: decoupled weight decay of matrices; norms and biases have none.
        clip: a gradient with a larger norm is scaled down to this norm.
        router_rate: learning rate of the routers, as a fraction of the other parameters'.
    """

    algorithm: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0)
    warmup: int = Field(4000, ge=0)
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    decay_steps: int | None = Field(None, ge=1)
    final_ratio: float = Field(0.01, ge=0, le=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-5, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0)
    router_rate: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _check_decay_steps(self) -> "OptimizerConfig":
        if self.schedule == "wsd" and self.decay_steps is None:
            raise ValueError("schedule 'wsd' needs decay_steps, for example a fifth of the steps")
        if self.schedule != "wsd" and self.decay_steps is not None:
            raise ValueError(f"only schedule 'wsd' has decay_steps; '{self.schedule}' decays")
        return self


def make_optimizers(
    model: nn.Module, config: OptimizerConfig, stacked: Mapping[str, int] = MappingProxyType({})
) -> tuple[Optimizer, ...]:
    """Optimizers of the trainable parameters; groups have an `lr_scale`.

    Args:
        model: the model, sharded or not.
        stacked: names of the parameters that stack several matrices, and how many.

    Returns:
        AdamW, and Muon if it has parameters.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    routers: list[nn.Parameter] = []
    orthogonalized: dict[int, list[nn.Parameter]] = {}  # by number of stacked matrices
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if uses_muon(name, parameter, config):
            orthogonalized.setdefault(stacked.get(name, 1), []).append(parameter)
        elif name.endswith(".router.weight"):
            routers.append(parameter)
        else:
            (vectors if _is_vector(name, parameter) else matrices).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay, "lr_scale": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": routers, "weight_decay": config.weight_decay, "lr_scale": config.router_rate},
    ]
    adamw = AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )
    if not orthogonalized:
        return (adamw,)
    groups = [
        {"params": parameters, "matrices": matrices, "lr_scale": 1.0}
        for matrices, parameters in orthogonalized.items()
    ]
    return adamw, Muon(groups, config.learning_rate, config.momentum, config.weight_decay)


def uses_muon(name: str, parameter: Tensor, config: OptimizerConfig) -> bool:
    """Whether Muon updates a parameter: the matrices of attention and experts."""
    is_inner = name.startswith("layers.") and ".router." not in name and ".auxiliary." not in name
    return config.algorithm == "muon" and is_inner and not _is_vector(name, parameter)


def _is_vector(name: str, parameter: Tensor) -> bool:
    # The norms of queries and keys have two dimensions: heads and their width.
    return parameter.ndim < 2 or "_norm." in name


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step 0, 1, …, `steps` − 1."""
    decay_start, last_step = config.warmup, steps - 1
    if config.decay_steps is not None:
        decay_start = max(decay_start, last_step - config.decay_steps)
    return scheduled_rate(
        config.learning_rate,
        step,
        config.warmup,
        decay_start,
        last_step,
        config.final_ratio,
        decay="cosine" if config.schedule == "cosine" else "linear",
    )


def scheduled_rate(
    peak: float,
    step: int,
    warmup: int,
    decay_start: int,
    last_step: int,
    final_ratio: float,
    decay: Literal["linear", "cosine"],
) -> float:
    """Linear warm-up to the peak, which is kept until the decay to `final_ratio` of it.

    Args:
        step: steps done before this one.
        warmup: steps of the warm-up.
        decay_start: last step with the highest learning rate, at least `warmup`.
        last_step: step from which on the learning rate is the final one.
        final_ratio: final learning rate as a fraction of the peak.
        decay: a straight line, or half a cosine.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, max(0, step - decay_start) / max(1, last_step - decay_start))
    if decay == "cosine":
        return peak * (final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * progress)) / 2)
    return peak * (1 - (1 - final_ratio) * progress)
