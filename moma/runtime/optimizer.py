"""AdamW with the paper's settings, and the learning rate over the steps."""

from pydantic import Field
from torch import nn
from torch.optim import AdamW

from moma.recipe import Config


class OptimizerConfig(Config):
    """AdamW and its schedule: linear warm-up, then linear decay (MoMa Table 5, Chameleon §2.3.2).

    Attributes:
        learning_rate: the peak.
        warmup: steps from 0 to the peak.
        final_ratio: learning rate of the last step as a part of the peak.
        clip: largest norm of the gradient.
        router_rate: learning rate of the routers as a part of the others'.
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
    """AdamW over the parameters that require a gradient; vectors (norms, biases) do not decay.

    Each group of parameters has a `rate` that multiplies the schedule's learning rate.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    routers = [p for name, p in trainable if name.endswith(".router.weight")]
    others = [(name, p) for name, p in trainable if not name.endswith(".router.weight")]
    # The norms of queries and keys have two dimensions: heads and their width.
    vectors = [p for name, p in others if p.ndim < 2 or "_norm." in name]
    matrices = [p for name, p in others if p.ndim >= 2 and "_norm." not in name]
    decay = config.weight_decay
    groups = [
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
    """Learning rate of step 0, 1, … of `steps`: up over the warm-up, then down to the final."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - 1 - config.warmup)
    return config.learning_rate * (1 - (1 - config.final_ratio) * min(1.0, progress))
