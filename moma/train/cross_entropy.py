"""Cross-entropy of the next token, computed from hidden vectors without holding all logits.

The logits of 24,576 tokens and 65,536 ids take 6.4 GB in fp32, and their gradient as much. Here the
head, the loss and both gradients are computed chunk by chunk in the forward pass, so that only one
chunk's logits exist at a time; the backward pass scales the gradients.

Shapes: see `model/layers.py`; M modalities, T tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moma.data.batches.packing import NO_LABEL
from moma.model.layers import product_dtype, upcast

# Logits of a chunk: enough to fill a GPU (256 MiB in fp32), and to stay near a CPU's cache.
_CHUNK_LOGITS = {"cuda": 2**26, "cpu": 2**24}


class TokenLosses(NamedTuple):
    """Losses of single tokens, fp32, not differentiable; 0 where there is no label.

    Attributes:
        loss_N: cross-entropy in nats.
        log_z_N: log Z, the logarithm of the softmax's denominator.
        correct_N: 1 where the most likely id is the label.
    """

    loss_N: Tensor
    log_z_N: Tensor
    correct_N: Tensor


class ChunkResult(NamedTuple):
    """A chunk's losses and, if needed, the gradients of its objective.

    Attributes:
        gradients: of the hidden vectors [T, D] and of the head's weight [V, D].
    """

    losses: TokenLosses
    gradients: tuple[Tensor, Tensor] | None


Chunk = Callable[[Tensor, Tensor, Tensor, float, bool], ChunkResult]


def chunk_tokens(vocabulary_size: int, device: torch.device) -> int:
    """Return the number of tokens whose logits exist at once."""
    return max(1, _CHUNK_LOGITS.get(device.type, 2**24) // vocabulary_size)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    z_loss: float,
    chunk: Chunk | None = None,
    tokens: int | None = None,
) -> tuple[Tensor, TokenLosses]:
    """Cross-entropy of `hidden · weightᵀ` with z-loss (Chameleon, arXiv 2405.09818 §2.3).

    Args:
        hidden_ND: normalized output of the last layer.
        labels_N: targets, `NO_LABEL` where there is none.
        z_loss: weight of (log Z)² in the objective.
        chunk: computes one chunk, by default `cross_entropy_chunk`; may be compiled.
        tokens: number of tokens of a chunk; if omitted, `chunk_tokens`.

    Returns:
        The objective, Σ loss + z_loss · (log Z)², differentiable once, and its parts by token.
    """
    tokens = tokens or chunk_tokens(len(weight_VD), hidden_ND.device)
    needs_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    objective, *parts = _LinearCrossEntropy.apply(
        hidden_ND, weight_VD, labels_N, z_loss, tokens, chunk or cross_entropy_chunk, needs_grad
    )
    return objective, TokenLosses(*parts)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        z_loss: float,
        tokens: int,
        chunk: Chunk,
        needs_grad: bool,
    ) -> tuple[Tensor, ...]:
        dtype = product_dtype(hidden_ND)
        weight = weight_VD.to(dtype)
        grad_weight_VD: Tensor | None = None
        losses, hidden_gradients = [], []
        for start in range(0, len(hidden_ND), tokens):
            part = slice(start, start + tokens)
            with torch.autocast(hidden_ND.device.type, enabled=False):
                result = chunk(
                    hidden_ND[part].to(dtype), weight, labels_N[part], z_loss, needs_grad
                )
            losses.append(result.losses)
            if result.gradients is not None:
                hidden_gradients.append(result.gradients[0])
                weight_part = result.gradients[1]
                if grad_weight_VD is None:
                    grad_weight_VD = upcast(weight_part)
                else:
                    grad_weight_VD += weight_part
        loss_N, log_z_N, correct_N = (torch.cat(parts) for parts in zip(*losses, strict=True))
        if grad_weight_VD is not None:
            grad_hidden_ND = torch.cat(hidden_gradients).to(hidden_ND.dtype)
            ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype))
        objective = (loss_N + z_loss * log_z_N.square()).sum()
        ctx.mark_non_differentiable(loss_N, log_z_N, correct_N)
        return objective, loss_N, log_z_N, correct_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD = ctx.saved_tensors
        hidden, weight = (each * grads[0].to(each.dtype) for each in (hidden_ND, weight_VD))
        return hidden, weight, None, None, None, None, None


def cross_entropy_chunk(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, z_loss: float, needs_grad: bool
) -> ChunkResult:
    """Compute the losses of a chunk of tokens and, if needed, the gradients of its objective.

    Args:
        labels_T, z_loss: as for `linear_cross_entropy`.
        needs_grad: whether to compute the gradients of Σ loss + z_loss · (log Z)².
    """
    logits_TV = upcast(functional.linear(hidden_TD, weight_VD))
    has_label_T = (labels_T != NO_LABEL).to(logits_TV.dtype)
    target_T1 = labels_T.clamp(min=0)[:, None]
    log_z_T = logits_TV.logsumexp(-1)
    losses = TokenLosses(
        (log_z_T - logits_TV.gather(1, target_T1).squeeze(1)) * has_label_T,
        log_z_T * has_label_T,
        (logits_TV.argmax(-1) == target_T1.squeeze(1)) * has_label_T,
    )
    if not needs_grad:
        return ChunkResult(losses, None)
    # ∂(loss + z · log²Z) / ∂logits = softmax · (1 + 2z · log Z) − onehot(target)
    softmax_TV = logits_TV.sub_(log_z_T[:, None]).exp_()
    grad_TV = softmax_TV.mul_(((1 + 2 * z_loss * log_z_T) * has_label_T)[:, None])
    is_target_TV = torch.arange(len(weight_VD), device=labels_T.device) == labels_T[:, None]
    grad_TV = grad_TV.sub_(is_target_TV.to(grad_TV.dtype)).to(hidden_TD.dtype)
    return ChunkResult(losses, (grad_TV @ weight_VD, grad_TV.T @ hidden_TD))
