"""Upcycling: what is copied, what is new, which seeds fit, and the output before training."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.errors import UserError
from moma.model.architecture import ModelConfig
from moma.model.depth import DepthConfig
from moma.model.experts import DenseGroup, ExpertGroup
from moma.model.groups import GroupConfig
from moma.model.routing import Auxiliary, Routing, logistic_noise, uniform_routing
from moma.model.transformer import Transformer
from moma.model.upcycling import match_groups, upcycle
from moma.runtime.weights import Weights
from tests.factories import make_vocabulary

VOCABULARY = make_vocabulary(codes=range(20, 40))


def config_of(groups, **changes) -> ModelConfig:
    # But for its epsilon, a norm removes the scale of the scores exactly.
    values = {"dim": 16, "layers": 3, "heads": 2, "norm_epsilon": 1e-12}
    return ModelConfig.model_validate(values | {"groups": groups} | changes)


def build(groups, seed: int = 0, **changes) -> Transformer:
    model = Transformer(config_of(groups, **changes), VOCABULARY, (0.5, 0.5))
    model.initialize(seed)
    return model


def upcycled_from(seed: Transformer, groups, **changes) -> Transformer:
    model = build(groups, seed=1, **changes)
    upcycle(Weights.from_tensors(seed.state_dict()), seed.config, model)
    return model


def tokens_of(sequences: int, length: int, seed: int) -> torch.Tensor:
    """Return tokens of which half are image codes."""
    generator = torch.Generator().manual_seed(seed)
    half = (sequences * length // 2,)
    text = torch.randint(5, 20, half, generator=generator)
    codes = torch.randint(20, 40, half, generator=generator)
    order = torch.randperm(sequences * length, generator=generator)
    return torch.cat((text, codes))[order].view(sequences, length)


def select_in_turn(model: Transformer) -> None:
    """Make expert e of a group select every E-th token, through the auxiliary routers."""

    def in_turn(experts: int):
        def logits_NE(x_ND):
            expert_N = torch.arange(len(x_ND)) % experts
            return torch.nn.functional.one_hot(expert_N, experts).to(x_ND.dtype) - 0.5

        return logits_NE

    for module in model.modules():
        if isinstance(module, ExpertGroup) and module.num_experts > 1:
            module.auxiliary.forward = in_turn(module.num_experts)  # type: ignore[method-assign]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["dense", "moe_1t1i"]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_a_token_that_one_expert_selects_keeps_the_seeds_output(seed_groups, text, image, seed):
    before = build(seed_groups, seed=seed).double().eval()
    after = upcycled_from(before, f"moe_{text}t{image}i", experts_implementation="grouped")
    after = after.double().eval()
    upcycle(Weights.from_tensors(before.state_dict()), before.config, after)  # in fp64 too
    select_in_turn(after)
    tokens = tokens_of(2, 12, seed)
    expected = before(tokens, routing=uniform_routing(Auxiliary())).head
    found = after(tokens, routing=uniform_routing(Auxiliary())).head
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_token_that_two_experts_select_keeps_it_but_not_one_that_none_selects():
    """Swin norm removes the sum of the scores, but cannot normalize zeros."""
    before = build("moe_1t1i").double().eval()
    after = upcycled_from(before, "moe_2t2i").double().eval()
    upcycle(Weights.from_tensors(before.state_dict()), before.config, after)
    tokens = tokens_of(2, 12, 0)
    expected = before(tokens, routing=uniform_routing(Auxiliary())).head
    for logit, equal in ((1.0, True), (-1.0, False)):
        for router in after.auxiliary_routers():
            router.forward = lambda x, v=logit: x.new_full((len(x), 2), v)  # type: ignore[method-assign,misc]
        found = after(tokens, routing=uniform_routing(Auxiliary())).head
        assert torch.allclose(found, expected, atol=1e-5) == equal


def test_expert_choice_keeps_the_output_of_tokens_that_exactly_one_expert_selects():
    """One layer, with the actual selection, token by token."""
    before = build("moe_1t1i", layers=1).eval()
    after = upcycled_from(before, "moe_3t2i", layers=1).eval()
    tokens = tokens_of(3, 16, 0)
    records = after(tokens, routing=Routing(record_auxiliary=True)).routers
    selections = sum(record.selected_NE.sum(1) for record in records)
    same = (after(tokens).head - before(tokens).head).abs().amax(-1).flatten() < 1e-4
    assert same[selections == 1].all() and (selections == 1).any()
    assert not same[selections == 0].any() and (selections == 0).any()


STEPS = [
    ("dense", "dense"),
    ("dense", "moe_1t1i"),
    ("dense", "moe_8x"),
    ("dense", "moe_7t1i"),
    ("dense", "mod"),
    ("dense", "mod_moe_2t2i"),
    ("moe_1t1i", "moe_1t1i"),
    ("moe_1t1i", "moe_4t4i"),
    ("moe_1t1i", "mod_moe_1t1i"),
    ("moe_1t1i", "mod_moe_3t1i"),
    ("moe_4t4i", "mod_moe_4t4i"),
    ("mod", "mod_moe_2t2i"),
    ("mod_moe_1t1i", "mod_moe_4t4i"),
]


@pytest.mark.parametrize(("seed_groups", "groups"), STEPS)
def test_what_is_copied_and_what_is_new(seed_groups, groups):
    seed, fresh = build(seed_groups, seed=0), build(groups, seed=1)
    state, initial = seed.state_dict(), fresh.state_dict()
    upcycled = upcycled_from(seed, groups).state_dict()
    same_groups = seed_groups.removeprefix("mod_") == groups.removeprefix("mod_")
    assert list(upcycled) == list(initial)
    for name, value in upcycled.items():
        if ".auxiliary." in name or name.endswith("cutoff_means_3E"):
            expected = initial[name]
        elif ".depth." in name:
            expected = state.get(name, initial[name])
        elif name.endswith("router.weight"):
            expected = state[name] if same_groups else initial[name]
        elif ".experts.groups." in name:
            expected = expert_of(seed, name, value)
        else:
            expected = state[name]
        assert torch.equal(value, expected), name
    assert not torch.equal(upcycled["head.weight"], initial["head.weight"])


def expert_of(seed: Transformer, name: str, value: torch.Tensor) -> torch.Tensor:
    """Return the seed's expert for the modality of an upcycled group, from its modules."""
    _, layer, _, _, number, part = name.split(".")[:6]
    groups = seed.get_submodule(f"layers.{layer}.experts.groups")
    group = groups[min(int(number), len(groups) - 1)]  # type: ignore[index,arg-type]
    if part == "feed_forward":
        return getattr(group, part).get_parameter(".".join(name.split(".")[6:]))
    if isinstance(group, DenseGroup):
        stack = getattr(group.feed_forward, part).weight.T
    else:
        stack = getattr(group, part)
    return stack.repeat(len(value) // len(stack), 1)


def group(names: str, experts: int) -> GroupConfig:
    return GroupConfig(modalities=tuple(names.split()), experts=experts)


def test_upcycling_in_steps_gives_the_weights_of_upcycling_at_once():
    """dense → 1t1i → 4t4i → mixture-of-depths: experts and shared parts stay the first seed's."""
    dense = build("dense", seed=3)
    pairs = upcycled_from(dense, "moe_1t1i")
    many = upcycled_from(pairs, "moe_4t4i")
    with_depth = upcycled_from(many, "mod_moe_4t4i")
    at_once = upcycled_from(dense, "mod_moe_4t4i")
    new = (".router.", ".depth.")
    once, last, before = (model.state_dict() for model in (at_once, with_depth, many))
    assert once.keys() == last.keys()
    for name, weight in last.items():
        if not any(part in name for part in new):
            assert torch.equal(weight, once[name]), name
        elif ".experts." in name and ".router." in name:
            assert torch.equal(weight, before[name]), name  # trained before, so kept


@pytest.mark.parametrize("groups", ["token_3x", "null_4t2i"])
def test_token_choice_starts_from_copies_with_new_routers(groups):
    seed = build("dense" if groups == "token_3x" else "moe_1t1i")
    upcycled, fresh = upcycled_from(seed, groups), build(groups, seed=1)
    for name, weight in upcycled.state_dict().items():
        if ".router." in name:
            assert torch.equal(weight, fresh.state_dict()[name])
    group = "layers.0.experts.groups.0"
    experts = len(upcycled.state_dict()[f"{group}.gate"]) // 16
    source = seed.state_dict()[
        f"{group}.feed_forward.gate.weight" if groups == "token_3x" else f"{group}.gate"
    ]
    source = source.T if groups == "token_3x" else source
    assert torch.equal(upcycled.state_dict()[f"{group}.gate"], source.repeat(experts, 1))


def test_routers_of_token_choice_keep_their_biases():
    seed = build("token_2t2i")
    for router in seed.token_routers():
        router.bias_O.normal_()
    upcycled = upcycled_from(seed, "mod_token_2t2i")
    for name, weight in seed.state_dict().items():
        assert torch.equal(weight, upcycled.state_dict()[name]) or ".cutoff_means_3E" in name


def test_groups_are_copied_from_the_closest_group():
    shared = (group("text", 1), group("image", 1), group("text image", 1))
    wide = (group("image", 4), group("text image", 2), group("text", 3))
    assert match_groups(shared, wide) == [1, 2, 0]
    audio = (group("text", 1), group("image audio", 1))
    split = (group("audio", 2), group("text", 2), group("image", 2))
    assert match_groups(audio, split) == [1, 0, 1]


@pytest.mark.parametrize(
    ("seed_groups", "groups", "message"),
    [
        ("moe_1t1i", "moe_8x", "no group of the seed"),
        ("moe_1t1i", "dense", "no group of the seed"),
        ("moe_2t2i", "moe_4t4i", "only a group of one expert can"),
        ("moe_4x", "moe_2t2i", "only a group of one expert can"),
        ("mod_moe_1t1i", "moe_4t4i", "layer 0"),
        ("moe_2t2i", "token_2t2i", "another way to choose"),
        ("null_2t2i", "token_2t2i", "another way to choose"),
        ([group("text", 1), group("image", 1), group("text image", 1)], "moe_2t2i", "same experts"),
        ([group("text image", 1), group("text image", 1)], "moe_2t2i", "more than one group"),
    ],
)
def test_seeds_that_do_not_fit_are_refused(seed_groups, groups, message):
    with pytest.raises(UserError, match=message):
        upcycled_from(build(seed_groups), groups)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dim", 32), ("layers", 2), ("heads", 4), ("kv_heads", 1), ("hidden", 24),
        ("norm", "pre"), ("query_key_norm", False), ("rope_theta", 500.0),
        ("attention_mask", "causal"), ("tied_embeddings", True),
    ],
)  # fmt: skip
def test_a_different_shape_is_refused(key, value):
    model = build("moe_2t2i", seed=1, **{key: value})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    seed = build("moe_1t1i")
    with pytest.raises(UserError, match=f"model.{key}: the seed has"):
        upcycle(Weights.from_tensors(seed.state_dict()), seed.config, model)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_keys_without_influence_on_the_weights_may_differ():
    seed = build("moe_1t1i", hidden_multiple=1, hidden=64)
    upcycled_from(seed, "moe_2t2i", dropout=0.1, kv_heads=2, router_noise=True,
               experts_implementation="batched", hidden_multiple=64)  # fmt: skip


def test_depth_routers_may_be_added_to_more_layers():
    seed = build("mod_moe_1t1i", depth=DepthConfig(layers=(1,)))
    upcycled = upcycled_from(seed, "mod_moe_2t2i", depth=DepthConfig(layers=(0, 1)))
    fresh = build("mod_moe_2t2i", seed=1, depth=DepthConfig(layers=(0, 1)))
    kept, new = "layers.1.depth.router.weight", "layers.0.depth.router.weight"
    assert torch.equal(upcycled.state_dict()[kept], seed.state_dict()[kept])
    assert torch.equal(upcycled.state_dict()[new], fresh.state_dict()[new])


def test_incompatible_weights_are_refused_before_anything_changes():
    seed, model = build("moe_1t1i"), build("moe_2t2i", seed=1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = seed.state_dict()
    smaller = state | {"head.weight": state["head.weight"][:30]}
    missing = {name: weight for name, weight in state.items() if name != "norm.weight"}
    for broken, message in ((smaller, r"\[30, 16\]"), (missing, "norm.weight")):
        with pytest.raises(UserError, match=message):
            upcycle(Weights.from_tensors(broken), seed.config, model)
        assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())


def noisy(training: bool) -> Transformer:
    return build("mod_moe_2t2i", router_noise=True).train(training)


def test_noise_is_the_difference_of_two_gumbel_variables():
    torch.manual_seed(0)
    noise = logistic_noise(torch.empty(400_000)).double()
    assert noise.isfinite().all()
    gumbel = torch.distributions.Gumbel(0.0, 1.0).sample((2, 400_000)).double()
    difference = gumbel[0] - gumbel[1]
    for quantile in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        exact = math.log(quantile / (1 - quantile))
        for sample in (noise, difference):
            assert sample.quantile(quantile).item() == pytest.approx(exact, abs=0.05)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 3, rel=0.02)


def test_noise_follows_the_generator_and_is_off_in_evaluation():
    tokens = tokens_of(2, 12, 0)
    model, without_noise = noisy(True), build("mod_moe_2t2i")

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(tokens).head

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    model.eval()
    state = torch.get_rng_state()
    assert torch.equal(model(tokens).head, without_noise(tokens).head)
    assert torch.equal(torch.get_rng_state(), state), "evaluation used the generator"
    model.train()
    causal = uniform_routing(Auxiliary())
    assert torch.equal(model(tokens, routing=causal).head,
                       without_noise(tokens, routing=causal).head)  # fmt: skip
    without_noise.train()
    assert torch.equal(without_noise(tokens).head, without_noise.eval()(tokens).head)


def test_noise_changes_only_the_routers_of_experts():
    """Depth routers get none: their wrong choices cannot be compensated (§2.4)."""
    tokens, records = tokens_of(2, 12, 0), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        records.append(noisy(True)(tokens, routing=Routing(record_auxiliary=True)).routers)
    first = [record.kind for record in records[0]].index("depth")
    assert torch.equal(records[0][first].selected_NE, records[1][first].selected_NE)
    assert not all(torch.equal(a.selected_NE, b.selected_NE) for a, b in zip(*records, strict=True))


def test_noise_changes_the_score_as_well_as_the_selection():
    """Equation 5 replaces every score by σ(z + noise)."""
    torch.manual_seed(0)
    group = ExpertGroup(8, 6, [0], num_experts=3, capacity_share=1.0, noise=True)
    for parameter in group.parameters():
        torch.nn.init.normal_(parameter)
    x, modality = torch.randn(12, 8), torch.zeros(12, dtype=torch.long)
    torch.manual_seed(1)
    selection = group.route(x, group.find_tokens(modality, Routing()), Routing())[0].selection
    torch.manual_seed(1)
    uniform = torch.rand(3, 12).T  # the memory layout of the logits
    score_EN = (x @ group.router.weight.T + (uniform / (1 - uniform)).log()).sigmoid().T
    expected = score_EN.topk(4).indices
    assert torch.equal(selection.index_EK.sort().values, expected.sort().values)
    torch.testing.assert_close(selection.weight_EK, score_EN.gather(1, selection.index_EK))
