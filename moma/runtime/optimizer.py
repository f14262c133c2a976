"""AdamW with the paper's settings, and the learning rate over the steps."""

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
    """

    learning_rate: float = 1e-4
    warmup: int = 4000
    final_ratio: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-5
    weight_decay: float = 0.1
    clip: float = 1.0


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over the parameters that require a gradient; vectors (norms, biases) do not decay."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
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
