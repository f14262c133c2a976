"""The whole model: causality, documents, counts, determinism."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moma.model.attention import Attention, Sight, document_mask
from moma.model.experts import RoutedGroup
from moma.model.flops import forward_flops, router_stage_flops_per_token
from moma.model.layers import rotary_angles
from moma.model.routing import Routing
from moma.model.transformer import ModelConfig, Transformer
from moma.runtime.world import can_compile
from moma.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    size=40,
    beginning=0,
    end=1,
    padding=2,
    begin_image=3,
    end_image=4,
    image_codes=tuple(range(5, 21)),
    codes_per_image=4,
)
ARCHITECTURES = ("dense", "moe_4x", "moe_1t1i", "moe_2t2i", "moe_3t1i")


def build(groups: str, **changes) -> Transformer:
    config = ModelConfig(groups=groups, dim=16, layers=2, heads=2, **changes)
    model = Transformer(config, VOCABULARY, (0.5, 0.5))
    model.initialise(0)
    return model.eval()


def mixed_tokens(rows: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY.size, (rows, length), generator=generator)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(ARCHITECTURES),
    st.sampled_from(["swin", "pre"]),
    st.integers(1, 14),
    st.integers(0, 99),
)
def test_causal_logits_do_not_depend_on_later_tokens(groups, norm, cut, seed):
    model = build(groups, norm=norm)
    tokens = mixed_tokens(2, 15, seed)
    changed = tokens.clone()
    changed[:, cut:] = mixed_tokens(2, 15, seed + 1)[:, cut:]
    causal = Routing(by="causal")
    before, after = (model(t, routing=causal).logits_BSV[:, :cut] for t in (tokens, changed))
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)


def test_batch_choice_is_not_causal():
    """The reason for auxiliary routers; were it causal, the test above would show nothing."""
    model = build("moe_2t2i")
    tokens = mixed_tokens(2, 15, 0)
    changed = torch.cat((tokens[:, :5], mixed_tokens(2, 15, 1)[:, 5:]), dim=1)
    before, after = (model(t).logits_BSV[:, :5] for t in (tokens, changed))
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("groups", ARCHITECTURES)
def test_documents_do_not_see_each_other(groups):
    model = build(groups)
    tokens = mixed_tokens(1, 12, 0)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    causal = Routing(by="causal")
    together = model(tokens, documents, positions, causal).logits_BSV
    alone = [model(part, routing=causal).logits_BSV for part in (tokens[:, :5], tokens[:, 5:])]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


def test_row_attention_looks_over_documents():
    model = build("dense", attend="row")
    tokens = mixed_tokens(1, 8, 0)
    documents = torch.tensor([[0] * 4 + [1] * 4])
    torch.testing.assert_close(
        model(tokens, documents).logits_BSV, model(tokens).logits_BSV, rtol=0, atol=0
    )


def test_attention_equals_a_slow_reference():
    torch.manual_seed(0)
    attention = Attention(12, 2, 2, query_key_norm=True).double()
    x = torch.randn(1, 7, 12, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    angles = rotary_angles(positions, 6, 10_000.0)
    got = attention(x, angles, Sight(document_mask(documents)))[0].detach().numpy()

    def head(linear, norm, at, h):
        value = (linear.weight.detach().numpy() @ x[0, at].numpy()).reshape(2, 6)[h]
        if norm is None:
            return value
        value = (value - value.mean()) / np.sqrt(value.var() + 1e-5)
        value = value * norm.weight.detach().numpy()[h] + norm.bias.detach().numpy()[h]
        rotated = np.empty(6)
        for pair in range(3):
            angle = positions[0, at].item() * 10_000.0 ** (-2 * pair / 6)
            a, b = value[pair], value[pair + 3]
            rotated[pair] = a * np.cos(angle) - b * np.sin(angle)
            rotated[pair + 3] = b * np.cos(angle) + a * np.sin(angle)
        return rotated

    expected = np.zeros((7, 12))
    for at, h in itertools.product(range(7), range(2)):
        seen = [s for s in range(at + 1) if documents[0, s] == documents[0, at]]
        query = head(attention.query, attention.query_norm, at, h)
        keys = [head(attention.key, attention.key_norm, s, h) for s in seen]
        weights = np.exp([query @ key / np.sqrt(6) for key in keys])
        values = np.array([head(attention.value, None, s, h) for s in seen])
        expected[at, h * 6 : h * 6 + 6] = weights @ values / weights.sum()
    expected = expected @ attention.output.weight.detach().numpy().T
    # Angles are computed in fp32.
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("groups", ARCHITECTURES)
def test_counted_flops_equal_the_flop_counter(groups):
    model = build(groups)
    tokens = mixed_tokens(4, 16, 0)
    # The fused CPU kernel is not counted by the counter; the plain products are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens)
    counted = sum(forward_flops(model.config, VOCABULARY.size, (0.5, 0.5), 4, 16).values())
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_counted_flops_of_the_router_stage_equal_the_flop_counter():
    model = build("moe_3t1i").requires_grad_(False)
    for router in model.auxiliary_routers():
        router.requires_grad_(True)
    tokens = mixed_tokens(4, 16, 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        records = model(tokens, routing=Routing(record=True)).routers
        sum(record.likelihood_NE.sum() for record in records).backward()
    counted = 64 * router_stage_flops_per_token(model.config, VOCABULARY.size, (0.5, 0.5), 4, 16)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_experts_cost_what_dense_costs():
    dense, sparse = (
        forward_flops(ModelConfig(groups=groups), 65_536, (0.5, 0.5), 6, 4096)
        for groups in ("dense", "moe_4t4i")
    )
    assert sparse["experts"] == dense["experts"]
    assert sum(sparse.values()) == pytest.approx(sum(dense.values()), rel=0.01)


def test_initialisation_depends_on_the_seed_alone():
    first, same, other = build("moe_2t2i"), build("moe_2t2i"), build("moe_2t2i")
    other.initialise(1)
    for a, b in zip(first.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert first.embedding.weight.std().item() == pytest.approx(1, rel=0.2)
    experts = first.get_submodule("layers.0.experts.groups.0")
    assert isinstance(experts, RoutedGroup)
    router = experts.router.weight
    assert router.sum(0).abs().max().item() < 1e-5 < router.abs().max().item()
    assert experts.gate_EDF.std().item() == pytest.approx(16**-0.5, rel=0.2)
    assert experts.down_EFD.std().item() == pytest.approx(first.config.hidden_width**-0.5, rel=0.2)


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
def test_layers_compile_without_a_break():
    model = build("moe_2t2i")
    tokens = mixed_tokens(2, 16, 0)
    documents, positions = torch.zeros_like(tokens), torch.arange(16).expand(2, 16)
    eager = model(tokens, documents, positions).logits_BSV
    for unit in model.units():
        unit.compile(fullgraph=True)
    compiled = model(tokens, documents, positions).logits_BSV
    torch.testing.assert_close(eager, compiled, atol=1e-4, rtol=1e-4)


def test_shares_must_add_up():
    with pytest.raises(ValueError, match="add up to 1"):
        Transformer(ModelConfig(dim=16, heads=2), VOCABULARY, (0.5, 0.4))
