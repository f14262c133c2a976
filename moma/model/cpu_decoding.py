"""Cached passes on a CPU: the computation of `Transformer.forward`, arranged for few tokens.

A pass over one token of each sequence has to read every weight that it uses once, which takes
longer than all arithmetic. So weights are stored in the order in which products with few rows read
them fastest ([in, out]; docs/results/generate.md), those of queries, keys and values in one matrix,
and those of a SwiGLU's gate and up projection as well. Which experts and layers a token uses is
decided on the host: unused weights are not read, and what remains are few, plain operations.

Shapes: see `layers.py`; G heads of keys and values, J width of joint queries, keys and values.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moma.model.attention import HeadNorm
from moma.model.caches import CachedContext, LayerCache
from moma.model.decoder_layer import DecoderLayer, DepthLayer
from moma.model.experts import DenseGroup, ExpertGroup
from moma.model.routers import AuxiliaryRouter, Router
from moma.model.routing import Policy, PolicyInputs, Routing, select_by_sequence
from moma.model.token_choice import TokenChoiceGroup, TokenRouter
from moma.model.transformer import Transformer

# Returns the weights of the experts' outputs, [N, E], 0 where an expert does not take a token.
Weigh = Callable[[Tensor, Policy], Tensor]

_ALL_11 = torch.ones(1, 1, dtype=torch.bool)


class _Router(NamedTuple):
    weight_DE: Tensor
    threshold_E1: Tensor
    auxiliary: AuxiliaryRouter


class _Experts(NamedTuple):
    """A group of experts for some modalities; `weigh` is None if it has only one."""

    modalities: Sequence[int]
    weigh: Weigh | None
    gate_up: Sequence[Tensor]  # [D, 2F] each
    down: Sequence[Tensor]  # [F, D] each


class CpuDecoder:
    """Computes the hidden vectors of new tokens.

    The model's parameters keep their shapes, but become views of the rearranged weights, which are
    stored only once. Thresholds of routers stay as they are now.

    Args:
        model: a model in fp32 on a CPU; it must not be trained any more.
    """

    def __init__(self, model: Transformer):
        _store_jointly([model.head.weight])
        modalities = range(len(model.vocabulary.modalities))
        self._layers = [_Layer(layer, modalities) for layer in model.units()]
        self._norm = model.norm

    def __call__(
        self,
        x_BSD: Tensor,
        context: CachedContext,
        caches: Sequence[LayerCache],
        routing: Routing,
    ) -> Tensor:
        """Return the last layer's normalized output, [B, S, D].

        Args:
            routing: policies without a capacity.
        """
        cosine, sine = context.rotary
        # Factors of a head, and of the head with its halves exchanged.
        rotary = torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)
        modality_N = context.modality_BS.flatten().tolist()
        x_ND = x_BSD.flatten(0, 1)
        for layer, cache in zip(self._layers, caches, strict=True):
            layer_context = context._replace(rotary=rotary, cache=cache)
            x_ND = layer(x_ND, layer_context, modality_N, routing)
        return _normalize(x_ND, self._norm).view_as(x_BSD)


class _Layer:
    """See `DecoderLayer` and `DepthLayer`."""

    def __init__(self, layer: DecoderLayer, modalities: Sequence[int]):
        attention = layer.attention
        self._swin, self._width = layer.swin, attention.width
        self._attention_norm, self._experts_norm = layer.attention_norm, layer.experts_norm
        joint = [each.weight for each in (attention.query, attention.key, attention.value)]
        self._heads = [len(weight) // attention.width for weight in joint]
        self._joint_DJ = _store_jointly(joint)
        self._output_DD = _store_jointly([attention.output.weight])
        self._head_norm: tuple[Tensor, Tensor] | None = None
        norms = attention.query_norm, attention.key_norm
        if isinstance(norms[0], HeadNorm) and isinstance(norms[1], HeadNorm):
            weight_HC = torch.cat([norms[0].weight.data, norms[1].weight.data])
            self._head_norm = weight_HC, torch.cat([norms[0].bias.data, norms[1].bias.data])
        self._groups = [_experts(group, modalities) for group in layer.experts.groups]
        self._depth: _Router | None = None
        self._is_by_modality = False
        if isinstance(layer, DepthLayer):
            self._depth = _router(layer.depth.router, layer.depth.auxiliary)
            self._is_by_modality = layer.depth.by_modality

    def __call__(
        self, x_ND: Tensor, context: CachedContext, modality_N: Sequence[int], routing: Routing
    ) -> Tensor:
        """Map [N, D] to [N, D]."""
        if self._depth is not None:
            return self._update_selected(x_ND, context, modality_N, routing)
        return self._update(x_ND, context, modality_N, routing.experts)

    def _update_selected(
        self, x_ND: Tensor, context: CachedContext, modality_N: Sequence[int], routing: Routing
    ) -> Tensor:
        """Update the tokens that mixture-of-depths selects."""
        assert self._depth is not None
        depth, shape = self._depth, context.modality_BS.shape
        if self._is_by_modality:
            threshold_RN = depth.threshold_E1[context.modality_BS.flatten().clamp(min=0)].T
            depth = depth._replace(threshold_E1=threshold_RN)
        logits_N1, selected_N1 = _select(depth, x_ND, routing.depth)
        selected_BS = selected_N1.view(shape) & (context.modality_BS >= 0)
        selection = select_by_sequence(selected_BS, logits_N1.view(shape))
        context = context.select(selection.index_EK, selection.filled_EK)
        if not selection.index_EK.shape[1]:
            return x_ND
        if shape[1] == 1:  # all tokens stay in their places; those not selected have weight 0
            if len(x_ND) > 1:
                modality_N = context.modality_BS.flatten().tolist()
            y_ND = self._update(x_ND, context, modality_N, routing.experts)
            return x_ND.lerp(y_ND, selection.weight_EK)
        index_T = selection.index_EK.flatten()
        x_TD, modality_T = x_ND[index_T], context.modality_BS.flatten().tolist()
        update_TD = self._update(x_TD, context, modality_T, routing.experts) - x_TD
        return x_ND.index_add(0, index_T, update_TD * selection.weight_EK.view(-1, 1))

    def _update(
        self, x_ND: Tensor, context: CachedContext, modality_N: Sequence[int], policy: Policy
    ) -> Tensor:
        """See `DecoderLayer`."""
        if not self._swin:
            attention_ND = self._attend(_normalize(x_ND, self._attention_norm), context)
            h_ND = x_ND + attention_ND
            y_ND = self._sum_experts(_normalize(h_ND, self._experts_norm), modality_N, policy)
            return h_ND if y_ND is None else h_ND + y_ND
        h_ND = _add_normalized(x_ND, self._attend(x_ND, context), self._attention_norm)
        y_ND = self._sum_experts(h_ND, modality_N, policy)
        # The norm of a token without experts is zero.
        return h_ND if y_ND is None else _add_normalized(h_ND, y_ND, self._experts_norm)

    def _attend(self, x_ND: Tensor, context: CachedContext) -> Tensor:
        query_heads, kv_heads, _ = self._heads
        joint_ND = torch.mm(x_ND, self._joint_DJ)
        joint_BSHC = joint_ND.view(*context.modality_BS.shape, -1, self._width)
        turned_BSHC, value = joint_BSHC.split((query_heads + kv_heads, kv_heads), dim=2)
        if self._head_norm is not None:
            weight_HC, bias_HC = self._head_norm
            normed = functional.layer_norm(turned_BSHC, (self._width,), eps=1e-5)
            turned_BSHC = torch.addcmul(bias_HC, normed, weight_HC)
        first, second = context.rotary
        exchanged = turned_BSHC.roll(self._width // 2, dims=-1)
        turned_BSHC = torch.addcmul(turned_BSHC * first, exchanged, second)
        query, key = turned_BSHC.split((query_heads, kv_heads), dim=2)
        y_BSHC = context.attend(query, key, value)
        return torch.mm(y_BSHC.reshape(x_ND.shape), self._output_DD)

    def _sum_experts(
        self, x_ND: Tensor, modality_N: Sequence[int], policy: Policy
    ) -> Tensor | None:
        """Equation 1 (`experts.py`); None if no expert takes a token."""
        total_ND: Tensor | None = None
        for group in self._groups:
            eligible = [row for row, each in enumerate(modality_N) if each in group.modalities]
            if not eligible:
                continue
            for rows, weights, gate_up_DF, down_FD in _chosen(group, x_ND, eligible, policy):
                if len(rows) == len(x_ND):
                    y_ND = _feed_forward(x_ND, gate_up_DF, down_FD, weights)
                    total_ND = y_ND if total_ND is None else total_ND.add_(y_ND)
                    continue
                total_ND = torch.zeros_like(x_ND) if total_ND is None else total_ND
                index_T = torch.tensor(rows)
                total_ND.index_add_(
                    0, index_T, _feed_forward(x_ND[index_T], gate_up_DF, down_FD, weights)
                )
        return total_ND


def _chosen(
    group: _Experts, x_ND: Tensor, eligible: Sequence[int], policy: Policy
) -> Iterator[tuple[Sequence[int], Sequence[float] | None, Tensor, Tensor]]:
    """Yield the experts that take tokens: which ones, their weights and those of the expert."""
    if group.weigh is None:
        yield eligible, None, group.gate_up[0], group.down[0]
        return
    x_TD = x_ND if len(eligible) == len(x_ND) else x_ND[torch.tensor(eligible)]
    weight_ET = group.weigh(x_TD, policy).T.tolist()
    for weight_T, gate_up_DF, down_FD in zip(weight_ET, group.gate_up, group.down, strict=True):
        taken = [(row, weight) for row, weight in zip(eligible, weight_T, strict=True) if weight]
        if taken:
            rows, weights = zip(*taken, strict=True)
            yield rows, weights, gate_up_DF, down_FD


def _feed_forward(
    x_TD: Tensor, gate_up_DF: Tensor, down_FD: Tensor, weights: Sequence[float] | None
) -> Tensor:
    """SwiGLU, times a weight of each token."""
    gate_TF, up_TF = torch.mm(x_TD, gate_up_DF).chunk(2, dim=-1)
    y_TD = torch.mm(functional.silu(gate_TF).mul_(up_TF), down_FD)
    if weights is None:
        return y_TD
    return y_TD.mul_(weights[0] if len(weights) == 1 else torch.tensor(weights)[:, None])


def _select(router: _Router, x_ND: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """A router's logits, and whether a policy without a capacity selects each token, [N, E]."""
    logits_NE = torch.mm(x_ND, router.weight_DE)
    auxiliary_EN = router.auxiliary(x_ND).T if policy.uses_auxiliary else None
    inputs = PolicyInputs(logits_NE.T, _ALL_11, auxiliary_EN, router.threshold_E1, lambda _: 0)
    return logits_NE, policy.candidates(inputs).T


def _weigh(router: _Router, x_ND: Tensor, policy: Policy) -> Tensor:
    logits_NE, selected_NE = _select(router, x_ND, policy)
    return logits_NE.sigmoid() * selected_NE


def _weigh_by_token(router: TokenRouter, x_ND: Tensor, policy: Policy) -> Tensor:
    choices = router.choose(x_ND, torch.ones(len(x_ND), dtype=torch.bool), noise=False)
    return choices.weight_NE.where(choices.taken_NE, 0)


def _normalize(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    return functional.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)


def _add_normalized(x_ND: Tensor, y_ND: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Return x + norm(y)."""
    if len(y_ND) > 1:
        return x_ND + _normalize(y_ND, norm)
    # RMSNorm is several operations on a CPU; these two take a third of the time.
    length = torch.linalg.vector_norm(y_ND).item()
    eps = torch.finfo(y_ND.dtype).eps if norm.eps is None else norm.eps
    root = math.hypot(length / y_ND.shape[1] ** 0.5, eps**0.5) or math.nan
    return torch.addcmul(x_ND, y_ND, norm.weight, value=1 / root)


def _router(router: Router, auxiliary: AuxiliaryRouter) -> _Router:
    return _Router(router.weight.data.T, router.threshold_E[:, None], auxiliary)


def _experts(group: nn.Module, modalities: Sequence[int]) -> _Experts:
    if isinstance(group, DenseGroup):
        swiglu = group.feed_forward
        gate_up_DF = _store_jointly([swiglu.gate.weight, swiglu.up.weight])
        return _Experts(modalities, None, [gate_up_DF], [_store_jointly([swiglu.down.weight])])
    assert isinstance(group, ExpertGroup)
    gate_EDF, up_EDF, down_EFD = (matrices.data for matrices in group.matrices())
    gate_up_EDF = torch.cat((gate_EDF, up_EDF), dim=-1)
    for parameter, part_EDF in zip((group.gate, group.up), gate_up_EDF.chunk(2, -1), strict=True):
        parameter.data = part_EDF.view(parameter.shape)
    weigh: Weigh | None = None
    if isinstance(group, TokenChoiceGroup):
        weigh = partial(_weigh_by_token, group.router)
    elif group.num_experts > 1:
        weigh = partial(_weigh, _router(group.router, group.auxiliary))
    return _Experts(group.modalities, weigh, gate_up_EDF.unbind(), down_EFD.unbind())


def _store_jointly(weights: Sequence[Tensor]) -> Tensor:
    """Store matrices [out, in] in one matrix [in, sum of out], and return it."""
    joint = torch.cat([weight.data for weight in weights]).T.contiguous()
    for weight, part in zip(weights, joint.split([len(each) for each in weights], 1), strict=True):
        weight.data = part.T
    return joint
