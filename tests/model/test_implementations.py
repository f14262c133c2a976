"""Three implementations of the experts with equal results, weights and graphs."""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.model import grouped, implementations
from moma.model.architecture import ModelConfig
from moma.model.dispatch import Dispatch, ScatterSlots, TableSlots
from moma.model.experts import MixtureOfExperts
from moma.model.grouped import grouped_product
from moma.model.groups import GroupConfig, TokenChoiceConfig, named_token_choice
from moma.model.implementations import (
    BatchedExperts,
    GroupedExperts,
    ImplementationName,
    build_experts,
    build_group,
    share_slots,
)
from moma.model.routing import (
    Auxiliary,
    ExpertChoice,
    Routing,
    Selection,
    Threshold,
    uniform_routing,
)
from moma.model.transformer import Transformer
from moma.runtime.world import can_compile
from moma.vocabulary import IMAGE, MODALITIES, TEXT
from tests.factories import make_vocabulary

DIM, HIDDEN = 8, 12
IMPLEMENTATIONS: tuple[ImplementationName, ...] = get_args(ImplementationName)
SHARES = (0.5, 0.5)


def groups_of(*counts: tuple[str, int]) -> tuple[GroupConfig, ...]:
    return tuple(GroupConfig(modalities=tuple(n.split()), experts=e) for n, e in counts)


LAYERS = {
    "4t4i": groups_of(("text", 4), ("image", 4)),
    "3t1i": groups_of(("text", 3), ("image", 1)),
    "1t1i": groups_of(("text", 1), ("image", 1)),
    "8x": groups_of(("text image", 8)),
    "overlapping": groups_of(("text", 1), ("image", 2), ("text image", 2), ("text image", 1)),
    "dense first": groups_of(("text image", 1), ("text", 2), ("image", 2)),
    "single twice": groups_of(("text", 1), ("image", 1), ("image", 1)),
}


def build(
    layer: str,
    implementation: ImplementationName,
    token_fraction: float = 1.0,
    dtype=torch.float32,
    dispatch: Dispatch = ScatterSlots,
    token_choice: TokenChoiceConfig | None = None,
) -> MixtureOfExperts:
    groups = [
        build_group(
            *(DIM, HIDDEN, each, SHARES, MODALITIES, token_fraction),
            dispatch=dispatch,
            token_choice=token_choice,
        )
        for each in LAYERS[layer]
    ]
    experts = build_experts(groups, implementation)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype)


def outcome(experts: Any, x, modality, routing) -> list[torch.Tensor]:
    """Output and all gradients; the gradient of a sum has zero strides."""
    experts.zero_grad()
    x = x.clone().requires_grad_()
    y, diagnostics = experts(x, modality, routing)
    if not y.requires_grad:  # causal routing without any token
        return [y]
    y.sum().backward()
    y2, _ = experts(x, modality, routing)
    y2.square().sum().backward()
    assert x.grad is not None
    grads = [p.grad for p in experts.parameters() if p.grad is not None]
    return [y, x.grad, *grads, *(each.nonfinite for each in diagnostics)]


POLICIES = (ExpertChoice(), ExpertChoice("actual"), Auxiliary(), Threshold())
FRACTIONS = (1.0, 0.25)
TOKEN_CHOICES = (None, named_token_choice("token_4x"), named_token_choice("null_4x"))


def assert_equal_results(layer, modality, policy, token_fraction, token_choice, seed):
    routing = uniform_routing(policy)
    x = torch.randn(1, len(modality), DIM, generator=torch.Generator().manual_seed(seed))
    results = [
        outcome(
            build(
                *(layer, implementation, token_fraction),
                dispatch=dispatch,
                token_choice=token_choice,
            ),
            x,
            torch.tensor([modality]),
            routing,
        )
        for implementation in IMPLEMENTATIONS
        for dispatch in (ScatterSlots, TableSlots)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("i", range(len(LAYERS)))
@pytest.mark.parametrize("j", range(len(POLICIES)))
def test_implementations_have_equal_results(i, j):
    """Each pair of layer, policy, token fraction and token choice at least once."""
    fraction, choice = FRACTIONS[(i + j // 2) % 2], TOKEN_CHOICES[(i + j) % 3]
    generator = torch.Generator().manual_seed(number := 4 * i + j)
    modality = torch.randint(-1, 2, (1 + number * 23 // 27,), generator=generator).tolist()
    assert_equal_results(sorted(LAYERS)[i], modality, POLICIES[j], fraction, choice, number)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(LAYERS)),
    st.lists(st.sampled_from([0, 1, -1]), min_size=1, max_size=24),
    st.sampled_from(POLICIES),
    st.sampled_from(FRACTIONS),
    st.sampled_from(TOKEN_CHOICES),
    st.integers(0, 99),
)
def test_implementations_have_equal_results_for_any_data(
    layer, modality, policy, token_fraction, token_choice, seed
):
    assert_equal_results(layer, modality, policy, token_fraction, token_choice, seed)


def test_implementations_differ():
    """Otherwise the test above would compare an implementation with itself."""
    kinds = {implementation: build("4t4i", implementation) for implementation in IMPLEMENTATIONS}
    assert type(kinds["sequential"]) is MixtureOfExperts and len(kinds["sequential"].units()) == 2
    assert type(kinds["batched"]) is BatchedExperts and type(kinds["grouped"]) is GroupedExperts
    assert kinds["batched"].units() == kinds["grouped"].units() == []


def test_parameter_names_do_not_depend_on_the_implementation():
    states = [build("overlapping", each).state_dict() for each in IMPLEMENTATIONS]
    assert list(states[0]) == list(states[1]) == list(states[2])
    assert any(name.startswith("groups.1.gate") for name in states[0])


def test_single_expert_groups_with_mixture_of_depths_share_their_slots(monkeypatch):
    """Each group has a slot for every token, but one grouped product computes only N of them."""
    rows: list[int] = []

    def counted(x_TD, weights, end_E):
        rows.append(x_TD[..., 0].numel())
        return grouped_product(x_TD, weights, end_E)

    monkeypatch.setattr(implementations, "grouped_product", counted)
    x, modality = torch.randn(1, 10, DIM), torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, -1, 0]])
    build("1t1i", "grouped", token_fraction=0.25)(x, modality, Routing())
    build("single twice", "grouped", token_fraction=0.25)(x, modality, Routing())
    build("1t1i", "grouped")(x, modality, Routing())
    # The last ones have no mixture-of-depths: batched products of each group.
    assert rows == [10] * 3 + [20] * 3 + [5] * 6


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=4), st.sampled_from([1, 8]), st.integers(1, 9)
)
def test_shared_slots_hold_the_tokens_of_every_expert(counts, alignment, spare):
    """Each expert's slots begin at a multiple, as the kernel's gradients require on a GPU."""
    selections = []
    for expert, count in enumerate(counts):
        index = torch.arange(count) + 100 * expert
        filled = (torch.arange(count + spare) < count)[None]
        index_1K = torch.nn.functional.pad(index, (0, spare))[None]
        selections.append(Selection(index_1K, filled, filled.float()))
    shared = sum(-(-count // alignment) * alignment for count in counts) + alignment
    index_T, expert_T, is_filled_T, weight_T, end_E = share_slots(selections, shared, alignment)
    assert end_E.dtype == torch.int32 and int(end_E[-1]) == shared
    assert not any(end % alignment for end in end_E.tolist())
    start = 0
    for expert, (count, end) in enumerate(zip(counts, end_E.tolist(), strict=True)):
        own = slice(start, end)
        assert expert_T[own].tolist() == [expert] * (end - start)
        filled_T = is_filled_T[own]
        assert index_T[own][filled_T].tolist() == [100 * expert + n for n in range(count)]
        assert torch.equal(weight_T[own], filled_T.float())
        start = end


@pytest.mark.parametrize("layer", sorted(LAYERS))
@pytest.mark.parametrize("token_fraction", [1.0, 0.25])
def test_grouped_with_the_kernel_equals_sequential(layer, token_fraction, monkeypatch):
    """With rows aligned as on a GPU."""
    x, modality = torch.randn(1, 32, DIM), torch.tensor([[0, 1, 1, -1] * 8])
    expected = outcome(build(layer, "sequential", token_fraction), x, modality, Routing())
    monkeypatch.setattr(grouped, "uses_kernel", lambda *_: True)
    monkeypatch.setattr(implementations, "row_alignment", lambda _: 8)
    found = outcome(build(layer, "grouped", token_fraction), x, modality, Routing())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_computes_products_in_bf16_and_returns_fp32(implementation):
    x, modality = torch.randn(1, 16, DIM), torch.tensor([[0, 1] * 8])
    experts = build("3t1i", implementation)
    exact, _ = experts(x, modality, Routing())
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = experts(x, modality, Routing())
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def bf16_contributions(experts: Any, x_ND, modality_N) -> torch.Tensor:
    """The exact sum, in fp64, of the outputs that each expert computes in bf16."""
    total_ND = torch.zeros(x_ND.shape, dtype=torch.float64)
    for group in experts.groups:
        (gate, up, down, selection), _ = group.route(
            x_ND, group.find_tokens(modality_N, Routing()), Routing()
        )
        for e, index_K in enumerate(selection.index_EK):
            x_KD = x_ND[index_K].bfloat16()
            hidden = torch.nn.functional.silu(x_KD @ gate[e].bfloat16()) * (x_KD @ up[e].bfloat16())
            ffn_KD = (hidden @ down[e].bfloat16()).double()
            total_ND.index_add_(0, index_K, selection.weight_EK[e][:, None].double() * ffn_KD)
    return total_ND


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("autocast", [True, False])
def test_outputs_computed_in_bf16_are_summed_in_fp32(implementation, autocast):
    """All experts prefer the same tokens, so that each of these has a sum of eight outputs."""
    dtype = torch.float32 if autocast else torch.bfloat16
    experts = build("8x", implementation, dtype=dtype)
    with torch.no_grad():
        router = experts.groups[0].get_submodule("router").get_parameter("weight")
        router.copy_(router[:1].expand_as(router))
        x_BSD = torch.randn(1, 64, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
        modality_BS = torch.zeros(1, 64, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found_BSD, _ = experts(x_BSD, modality_BS, Routing())
        exact_ND = bf16_contributions(experts, x_BSD[0], modality_BS[0])
    used_N = exact_ND.any(1)
    assert used_N.sum() == 8  # 64 tokens / 8 experts, the same for all
    found, exact = found_BSD[0][used_N].double(), exact_ND[used_N]
    error = ((found - exact).abs() / exact.abs()).median()
    # Rounded at most once, to the output's dtype; a few products are rounded differently.
    assert error < (1e-5 if autocast else 2**-9)
    if not autocast:
        assert (found == exact.bfloat16().double()).float().mean() > 0.9


def assert_one_graph(
    layer: str, implementation: ImplementationName, backend: str, dispatch: Dispatch
) -> None:
    """Layers without empty slots are captured whole in `test_compile.py`."""
    x, modality = torch.randn(1, 16, DIM), torch.tensor([[0, 1] * 8])
    torch.compiler.reset()
    experts = build(layer, implementation, token_fraction=0.25, dispatch=dispatch)
    compiled = torch.compile(experts, fullgraph=True, backend=backend)
    expected = outcome(experts, x, modality, Routing())
    found = outcome(compiled, x, modality, Routing())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("layer", "implementation", "dispatch"),
    [
        # Layers of the first three are traced in `test_compile.py`, too.
        *(
            pytest.param(
                *("overlapping", each, ScatterSlots),
                marks=() if each == "triton" else pytest.mark.slow,
            )
            for each in IMPLEMENTATIONS
        ),
        ("single twice", "grouped", TableSlots),  # shares slots
    ],
)
def test_every_implementation_is_one_graph(layer, implementation, dispatch):
    """Captured and differentiated without graph breaks; no code is generated."""
    assert_one_graph(layer, implementation, "aot_eager", dispatch)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
@pytest.mark.parametrize("layer", ["overlapping", "single twice"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dispatch", [ScatterSlots, TableSlots])
def test_every_compiled_implementation_equals_eager(layer, implementation, dispatch):
    assert_one_graph(layer, implementation, "inductor", dispatch)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_configured_implementation_gives_the_default_results(implementation):
    vocabulary = make_vocabulary(12, (5, 6), 1)
    config = ModelConfig(
        dim=8, layers=2, heads=2, groups="mod_moe_1t1i", experts_implementation=implementation
    )
    model = Transformer(config, vocabulary, SHARES)
    model.initialize(0)
    default = Transformer(
        config.model_copy(update={"experts_implementation": None}), vocabulary, SHARES
    )
    default.load_state_dict(model.state_dict())
    tokens = torch.tensor([[7, 5, 8, 6, 9, 5, 10, 6]])
    torch.testing.assert_close(model(tokens).head, default(tokens).head)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("implementation", get_args(ImplementationName))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expert_outputs_are_summed_in_fp32_under_reduced_precision(layer, implementation, dtype):
    """With autocast of fp32 weights, and with bf16 weights, as FSDP provides them."""
    experts = build(layer, implementation, dtype=dtype)
    x_BSD = torch.randn(2, 8, DIM).to(dtype)
    modality_BS = torch.tensor([[TEXT, IMAGE] * 4] * 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        found, _ = experts(x_BSD, modality_BS, Routing())
    expected, _ = build(layer, implementation)(x_BSD.float(), modality_BS, Routing())
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)
