"""Activation checkpointing: less memory for the backward pass, more computation."""

from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Recompute = Literal["none", "layer", "selective"]

# What is dear, and the choices, which must come out the same. By name: the model's own operation
# need not be there yet.
_KEPT = {
    "aten.mm.default",
    "aten.bmm.default",
    "aten.addmm.default",
    "aten._grouped_mm.default",
    "moma.grouped_product.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten.topk.default",
}


def recompute(module: nn.Module, how: Recompute) -> None:
    """Let a module forget activations in the forward pass and compute them again when needed."""
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    computed = module.forward

    def forward(*arguments: Any) -> Any:  # compiling needs a function of ours here
        return checkpoint(computed, *arguments, **options)

    module.forward = forward  # type: ignore[method-assign]


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    kept = str(operation) in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
