"""AdamW with the paper's hyperparameters, and the learning-rate schedule."""

import math
from typing import Any, Literal

from pydantic import Field
from torch import nn
from torch.optim import AdamW

from moma.recipe import Config


class OptimizerConfig(Config):
    """AdamW and its schedule: linear warm-up, then linear decay (MoMa Table 5, Chameleon §2.3.2).

    Attributes:
        learning_rate: peak learning rate.
        warmup: steps over which the learning rate rises to the peak.
        final_ratio: learning rate of the last step, as a fraction of the peak.
        beta1: decay of the mean of the gradient.
        beta2: decay of the mean of the squared gradient.
        epsilon: added to the denominator of the update.
        weight_decay: decoupled weight decay of matrices; norms and biases have none.
        clip: largest norm of the gradient.
        router_rate: learning rate of the routers, as a fraction of the other parameters'.
    """

    learning_rate: float = Field(1e-4, gt=0)
    warmup: int = Field(4000, ge=0)
    final_ratio: float = Field(0.01, ge=0, le=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip: float = Field(1.0, gt=0)
    router_rate: float = Field(1.0, ge=0)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over the trainable parameters; groups have a `rate` that scales the learning rate."""
    routers: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # The norms of queries and keys have two dimensions: heads and their width.
        is_vector = parameter.ndim < 2 or "_norm." in name
        is_router = name.endswith(".router.weight")
        if parameter.requires_grad:
            (routers if is_router else vectors if is_vector else matrices).append(parameter)
    decay = config.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay, "rate": 1.0},
        {"params": vectors, "weight_decay": 0.0, "rate": 1.0},
        {"params": routers, "weight_decay": decay, "rate": config.router_rate},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step 0, 1, …, `steps` − 1."""
    warmup, decay_steps = config.warmup, steps - 1 - config.warmup
    return scheduled_rate(config.learning_rate, step, warmup, decay_steps, config.final_ratio)


def scheduled_rate(
    peak: float,
    step: int,
    warmup: int,
    decay_steps: int,
    final_ratio: float,
    decay: Literal["linear", "cosine"] = "linear",
) -> float:
    """Linear warm-up to the peak, then decay to `final_ratio` of it.

    Args:
        peak: highest learning rate.
        step: steps done before this one.
        warmup: steps of the warm-up.
        decay_steps: steps after the warm-up until the final learning rate is reached.
        final_ratio: final learning rate as a fraction of the peak.
        decay: a straight line, or half a cosine.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, decay_steps)
    if decay == "cosine":
        return peak * (final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * progress)) / 2)
    return peak * (1 - (1 - final_ratio) * min(1.0, progress))
