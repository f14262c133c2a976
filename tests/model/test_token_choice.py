"""Token choice and null experts against a loop over tokens; dropping, balance and causality."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from moma.model.architecture import ModelConfig
from moma.model.groups import TokenChoiceConfig, named_token_choice
from moma.model.routing import ExpertChoice, Noisy, Routing, Threshold, uniform_routing
from moma.model.token_choice import TokenChoiceGroup, TokenRouter
from moma.model.transformer import Transformer
from moma.vocabulary import IMAGE, TEXT
from tests.factories import make_vocabulary

DIM, HIDDEN = 6, 10
STATIC, DROPLESS = Routing(), uniform_routing(Threshold())
CONFIGS = {
    "top1": TokenChoiceConfig(),
    "top2": TokenChoiceConfig(top_k=2, capacity_factor=1.0, balance_loss=0.5),
    "null": TokenChoiceConfig(top_k=2, data_sparsity=0.5, balance_loss=0.02),
    "few_null": TokenChoiceConfig(top_k=3, data_sparsity=0.75, capacity_factor=0.5),
}


def group_of(config: TokenChoiceConfig, experts: int, seed: int = 0) -> TokenChoiceGroup:
    """A group of image experts with random weights and biases."""
    torch.manual_seed(seed)
    share = 0.5 * config.capacity_factor * config.experts_per_token(experts)
    group = TokenChoiceGroup(config, DIM, HIDDEN, [IMAGE], experts, share).double()
    for parameter in group.parameters():
        torch.nn.init.normal_(parameter)
    group.router.bias_O.normal_(std=0.2)
    return group


def run(group: TokenChoiceGroup, x_ND: Tensor, modality_N: Tensor, routing: Routing = STATIC):
    return group(x_ND, group.find_tokens(modality_N, routing), routing)


def slow_group(
    group: TokenChoiceGroup, x_ND: Tensor, modalities: list[int], slots: int | None
) -> tuple[Tensor, Tensor, int]:
    """Outputs token by token, the load balancing loss, and the number of dropped tokens."""
    config, experts = group.router.config, group.num_experts
    weight, bias = group.router.weight, group.router.bias_O.tolist()
    nulls = config.null_experts(experts)
    of_output = [*range(experts), *[experts] * nulls]  # the router's row of each expert
    eligible = [n for n, modality in enumerate(modalities) if modality == IMAGE]
    takers: dict[int, list[tuple[float, int, Tensor]]] = {e: [] for e in range(experts)}
    taken_by = [0] * len(of_output)
    mean = torch.zeros(len(of_output), dtype=torch.float64)
    for n in eligible:
        logits = torch.stack([weight[row] @ x_ND[n] for row in of_output])
        scores = logits.exp() / logits.exp().sum() if nulls else 1 / (1 + (-logits).exp())
        biased = [score + bias[row] for score, row in zip(scores.tolist(), of_output, strict=True)]
        taken = sorted(range(len(biased)), key=lambda q: -biased[q])[: config.top_k]
        real = [q for q in taken if q < experts]
        for q in taken:
            taken_by[q] += 1
        for e in real:
            factor = scores[e] / sum(scores[r] for r in real) if nulls else scores[e]
            takers[e].append((scores[e].item(), n, factor))
        mean = mean + scores / scores.sum() / len(eligible)
    output, dropped = torch.zeros_like(x_ND), 0
    gate_EDF, up_EDF, down_EFD = group.matrices()
    for e, found in takers.items():
        kept = sorted(found, key=lambda item: -item[0])[:slots]
        dropped += len(found) - len(kept)
        for _, n, factor in kept:
            x_D = x_ND[n]
            ffn_D = (functional.silu(x_D @ gate_EDF[e]) * (x_D @ up_EDF[e])) @ down_EFD[e]
            output = output.index_add(0, torch.tensor([n]), (factor * ffn_D)[None])
    fractions = torch.tensor(taken_by, dtype=torch.float64) / max(1, sum(taken_by))
    loss = config.balance_loss * len(of_output) * (fractions * mean).sum()
    return output, loss, dropped


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.sampled_from([TEXT, IMAGE, IMAGE, -1]), min_size=1, max_size=12),
    st.integers(3, 4),
    st.booleans(),
    st.integers(0, 1000),
)
def test_outputs_and_gradients_equal_a_loop_over_tokens(name, modalities, experts, static, seed):
    config = CONFIGS[name]
    group = group_of(config, experts, seed)
    x_ND = torch.randn(len(modalities), DIM, dtype=torch.float64, requires_grad=True)
    y_ND, diagnostics = run(group, x_ND, torch.tensor(modalities), STATIC if static else DROPLESS)
    slots = None
    if static:
        fraction = 0.5 * config.capacity_factor * config.experts_per_token(experts) / experts
        slots = -int(-(fraction * len(modalities) - 1e-6) // 1)
    expected_ND, expected_loss, _ = slow_group(group, x_ND, modalities, slots)
    torch.testing.assert_close(y_ND, expected_ND)
    parameters = [x_ND, *group.parameters()]
    # Perhaps no token takes a real expert: then gradients are zero.
    objective, expected = (
        each.square().sum() + sum(0 * part.sum() for part in parameters)
        for each in (y_ND, expected_ND)
    )
    if static and config.balance_loss:
        torch.testing.assert_close(diagnostics[0].loss, expected_loss)
        objective, expected = objective + diagnostics[0].loss, expected + expected_loss
    found, slow = (
        torch.autograd.grad(each, parameters, allow_unused=True, materialize_grads=True)
        for each in (objective, expected)
    )
    torch.testing.assert_close(found, slow)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_an_expert_drops_its_lowest_scores_and_counts_them(name, seed):
    group = group_of(CONFIGS[name], 4, seed)
    x_ND = torch.randn(12, DIM, dtype=torch.float64)
    modality_N = torch.full((12,), IMAGE)
    kept, all_taken = (
        run(group, x_ND, modality_N, uniform_routing(policy, record_selection=True))[1][0]
        for policy in (ExpertChoice(), Threshold())
    )
    assert kept.record is not None and all_taken.record is not None
    selected_NE, taken_NE = kept.record.selected_NE > 0, all_taken.record.selected_NE > 0
    dropped_NE = taken_NE & ~selected_NE
    assert not (selected_NE & ~taken_NE).any()
    assert kept.record.excess == dropped_NE.sum()
    assert (kept.load_O[:4] == taken_NE.sum(0)).all()  # counted before tokens are dropped
    for expert in range(4):
        logits_N = kept.record.logits_NE[:, expert]
        if dropped_NE[:, expert].any() and selected_NE[:, expert].any():
            highest_dropped = logits_N[dropped_NE[:, expert]].max()
            assert highest_dropped <= logits_N[selected_NE[:, expert]].min()


def test_null_experts_take_tokens_and_the_loads_add_up():
    group = group_of(CONFIGS["null"], 4)
    x_ND = torch.randn(50, DIM, dtype=torch.float64)
    _, (found,) = run(group, x_ND, torch.full((50,), IMAGE))
    assert found.load_O.shape == (5,) and found.load_O[4] > 0
    assert found.load_O[:4].sum() + 4 * found.load_O[4] == 2 * 50
    with torch.no_grad():
        group.router.bias_O[4] = 10.0  # all tokens take null experts only
    y_ND, _ = run(group, x_ND, torch.full((50,), IMAGE))
    assert not y_ND.any()


def test_router_noise_changes_what_tokens_take_only_in_training():
    group = group_of(CONFIGS["top1"], 4)
    group.noise = True
    x_ND, modality_N = torch.randn(40, DIM, dtype=torch.float64), torch.full((40,), IMAGE)
    (clean, _), (again, _) = (run(group.eval(), x_ND, modality_N) for _ in range(2))
    noisy, _ = run(group.train(), x_ND, modality_N)
    assert torch.equal(clean, again) and not torch.equal(clean, noisy)


def test_decisions_of_tokens_cannot_be_inverted():
    group, x_ND = group_of(CONFIGS["top1"], 4), torch.randn(4, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="Noisy for depth"):
        run(group, x_ND, torch.full((4,), IMAGE), Routing(Noisy(Threshold(), 0.1)))


def test_biases_move_by_the_sign_of_the_load_error():
    router = TokenRouter(DIM, 3, TokenChoiceConfig(bias_rate=0.25))
    router.update_bias(torch.tensor([5.0, 3.0, 1.0]))
    assert router.bias_O.tolist() == [-0.25, 0.0, 0.25]
    with_null = TokenRouter(DIM, 3, TokenChoiceConfig(top_k=2, data_sparsity=0.5, bias_rate=0.5))
    with_null.update_bias(torch.tensor([4.0, 2.0, 6.0, 4.0]))  # of 6, with three null experts
    assert with_null.bias_O.tolist() == [0.0, 0.5, -0.5, 0.0]


def test_biases_balance_the_load():
    group = group_of(TokenChoiceConfig(bias_rate=0.02), 4)
    x_ND = torch.randn(256, DIM, dtype=torch.float64) + 1  # one expert suits most tokens
    group.router.bias_O.zero_()
    loads = []
    for _ in range(60):
        _, (found,) = run(group, x_ND, torch.full((256,), IMAGE))
        loads.append(found.load_O)
        group.router.update_bias(found.load_O)
    assert loads[0].max() > 100 and loads[-1].max() < 80


def test_the_balance_loss_spreads_tokens_over_real_and_null_experts():
    """Its gradient alone lets tokens take as many real experts as `data_sparsity` says."""
    group = group_of(TokenChoiceConfig(top_k=2, data_sparsity=0.5, balance_loss=1.0), 4)
    group.router.bias_O.zero_()
    x_ND = torch.randn(256, DIM, dtype=torch.float64) + 1
    optimizer = torch.optim.Adam([group.router.weight], lr=0.03)
    for _ in range(80):
        _, (found,) = run(group, x_ND, torch.full((256,), IMAGE))
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
    assert found.load_O[:4].sum() / 256 == pytest.approx(1.0, abs=0.15)
    assert found.load_O.max() < 1.5 * 2 * 256 / 8


@pytest.mark.parametrize("groups", ["token_4x", "token_2t2i", "null_4x", "null_2t1i"])
@torch.no_grad()
def test_later_tokens_do_not_change_earlier_ones(groups):
    """Under any routing but that of training, exactly."""
    config = ModelConfig(groups=groups, dim=16, layers=2, heads=2)
    model = Transformer(config, make_vocabulary(), (0.5, 0.5))
    model.initialize(0)
    tokens_BS = torch.randint(5, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    changed_BS = tokens_BS.clone()
    changed_BS[:, 8:] = 5 + changed_BS[:, 8:].flip(1) % 30
    for routing in (model.named_routing("causal"), uniform_routing(ExpertChoice("actual"))):
        one, other = (model.eval()(ids, routing=routing).head for ids in (tokens_BS, changed_BS))
        torch.testing.assert_close(one[:, :8], other[:, :8], rtol=0, atol=1e-6)
        assert not torch.allclose(one[:, 8:], other[:, 8:])
    assert not config.has_expert_choice and not list(model.auxiliary_routers())


def test_names_stand_for_keys():
    token, null = named_token_choice("mod_token_8x"), named_token_choice("null_4t4i")
    assert token == TokenChoiceConfig(top_k=1, data_sparsity=1, bias_rate=0.001, balance_loss=0)
    assert null == TokenChoiceConfig(top_k=2, data_sparsity=0.5, bias_rate=0, balance_loss=0.02)
    assert named_token_choice("moe_4t4i") is None
    assert ModelConfig(groups="token_4t4i").group_list == ModelConfig(groups="moe_4t4i").group_list
    assert ModelConfig(groups="mod_token_8x").depth_layers
    assert null is not None and [null.null_experts(n) for n in (2, 4, 8)] == [2, 4, 8]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"groups": "token_1t1i"}, "several experts"),
        ({"groups": "dense", "token_choice": {}}, "several experts"),
        ({"groups": "moe_6t2i", "token_choice": {"top_k": 3}}, "top_k 3 exceeds the 2 experts"),
        ({"groups": "null_8x", "token_choice": {"capacity_factor": 2}}, "data_sparsity = 1"),
        ({"groups": "token_8x", "token_choice": {"data_sparsity": 0.5}}, "data_sparsity = 0.5"),
    ],
)
def test_contradictions_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(values)
    with pytest.raises(ValidationError, match="'token_0t4i': a group needs from 1"):
        ModelConfig(groups="token_0t4i")
