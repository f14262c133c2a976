"""Activation checkpointing: less memory in exchange for more computation."""

from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Recompute = Literal["none", "layer", "selective"]

# Saved by selective checkpointing: expensive products, and the routers' top-k, whose result has to
# stay the same. By name, since the model's own operations may not be registered yet.
_SAVED_OPERATIONS = {
    "aten.mm.default",
    "aten.bmm.default",
    "aten.addmm.default",
    "aten._grouped_mm.default",
    "aten._scaled_mm.default",
    "moma.grouped_product.default",
    "moma.float8_product.default",
    "moma.fused_experts.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "torch_attn._varlen_attn.default",
    "aten.topk.default",
}


def recompute(module: nn.Module, how: Recompute) -> None:
    """Recompute a module's activations in the backward pass instead of saving them.

    Args:
        module: its `forward` is replaced.
        how: see `EngineConfig.recompute`; `selective` saves `_SAVED_OPERATIONS`.
    """
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    computed = module.forward

    def forward(*arguments: Any) -> Any:  # torch.compile needs a Python function here
        return checkpoint(computed, *arguments, **options)

    module.forward = forward  # type: ignore[method-assign]


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    saved = str(operation) in _SAVED_OPERATIONS
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
