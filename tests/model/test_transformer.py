"""The whole model: causality, documents, padding, initialization, non-finite values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.errors import UserError
from moma.model.architecture import ModelConfig
from moma.model.attention_kernels import MaskedAttention
from moma.model.decoder_layer import DecoderLayer
from moma.model.dispatch import ScatterSlots, TableSlots
from moma.model.experts import ExpertGroup
from moma.model.routing import Auxiliary, ExpertChoice, Routing, Threshold, uniform_routing
from moma.model.transformer import Transformer
from tests.factories import make_vocabulary, set_thresholds

VOCABULARY = make_vocabulary()
ARCHITECTURES = ("dense", "moe_4x", "moe_1t1i", "moe_2t2i", "moe_3t1i", "mod", "mod_moe_2t2i")
CHOICE, ACTUAL, CAUSAL = (
    Routing(),
    uniform_routing(ExpertChoice("actual")),
    uniform_routing(Auxiliary()),
)
RECORD = Routing(record_auxiliary=True)


def build(groups: str, **changes) -> Transformer:
    config = ModelConfig(groups=groups, dim=16, layers=2, heads=2, **changes)
    model = Transformer(config, VOCABULARY, (0.5, 0.5))
    model.initialize(0)
    return model.eval()


def mixed_tokens(sequences: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY.size, (sequences, length), generator=generator)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(ARCHITECTURES),
    st.sampled_from([{}, {"norm": "pre"}, {"kv_heads": 1}, {"tied_embeddings": True}]),
    st.integers(1, 14),
    st.integers(0, 99),
    st.sampled_from([Auxiliary(), Threshold()]),
)
def test_causal_logits_do_not_depend_on_later_tokens(groups, changes, cut, seed, policy):
    model = build(groups, **changes).double()
    tokens = mixed_tokens(2, 15, seed)
    set_thresholds(model, tokens)
    changed = tokens.clone()
    changed[:, cut:] = mixed_tokens(2, 15, seed + 1)[:, cut:]
    causal = uniform_routing(policy)
    before, after = (model(t, routing=causal).head[:, :cut] for t in (tokens, changed))
    # Not bit for bit: products of other numbers of rows are rounded differently.
    torch.testing.assert_close(before, after, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("groups", ["moe_2t2i", "mod"])
def test_expert_choice_is_not_causal(groups):
    """The reason for auxiliary routers, and a check of the test above."""
    model = build(groups)
    tokens = mixed_tokens(2, 15, 0)
    changed = torch.cat((tokens[:, :5], mixed_tokens(2, 15, 1)[:, 5:]), dim=1)
    before, after = (model(t).head[:, :5] for t in (tokens, changed))
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize(
    ("policy", "threshold"), [(Auxiliary(), 0.0), (Threshold(), 0.01), (Threshold(), 1e9)]
)
def test_causal_routing_records_what_it_selects(policy, threshold):
    """Also of a layer with mixture-of-depths that no token passes."""
    model, tokens = build("mod_moe_2t2i"), mixed_tokens(2, 15, 0)
    for router in model.routers():
        router.cutoff_means_3E.copy_(
            torch.tensor([[threshold], [1.0], [1.0]]).expand_as(router.cutoff_means_3E)
        )
    flags = {"record_auxiliary": True} if isinstance(policy, Auxiliary) else {}
    records = model(tokens, routing=uniform_routing(policy, record_selection=True, **flags)).routers
    assert {record.kind for record in records} == {"experts", "depth"}
    for record, router in zip(records, model.routers(), strict=True):
        decided = record.logits_NE > router.threshold_E
        if isinstance(policy, Auxiliary):
            decided = record.auxiliary_logits_NE > 0
        assert torch.equal(record.selected_NE.bool(), decided & record.eligible_N[:, None])


@pytest.mark.parametrize("groups", ARCHITECTURES)
def test_documents_do_not_attend_to_each_other(groups):
    model = build(groups)
    tokens = mixed_tokens(1, 12, 0)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    causal = uniform_routing(Auxiliary())
    together = model(tokens, documents, positions, causal).head
    separate = [model(part, routing=causal).head for part in (tokens[:, :5], tokens[:, 5:])]
    torch.testing.assert_close(together, torch.cat(separate, dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_layers_share_one_mask_in_the_precision_of_their_products(dtype):
    model, masks = build("dense"), []
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    model = model.double() if dtype == torch.float64 else model
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, given: masks.append(given[1].layout))
    with autocast:
        model(mixed_tokens(1, 8, 0), torch.tensor([[0] * 4 + [1] * 4]))
    assert len(masks) > 1 and all(mask is masks[0] for mask in masks)
    assert masks[0].dtype == dtype


@pytest.mark.parametrize("groups", ["moe_1t1i", "mod_moe_2t2i"])
def test_modalities_are_found_once_for_all_layers_that_all_tokens_reach(groups):
    """Layers with mixture-of-depths find those of the tokens that they select."""
    config = ModelConfig(groups=groups, dim=16, layers=4, heads=2)
    model, found = Transformer(config, VOCABULARY, (0.5, 0.5)), []
    model.initialize(0)
    for number in range(4):
        experts = model.get_submodule(f"layers.{number}.experts")
        experts.register_forward_pre_hook(lambda _, given: found.append(given[3]))
    model(mixed_tokens(2, 15, 0))
    shared = found[1]  # layer 1 has no mixture-of-depths
    is_own = [tokens is not shared for tokens in found]
    assert is_own == [number in config.depth_layers for number in range(4)]


@pytest.mark.parametrize(("norm", "dispatch"), [("swin", ScatterSlots), ("pre", TableSlots)])
def test_what_runs_around_the_experts_is_two_graphs(norm, dispatch):
    """With mixture-of-depths the choice of tokens, and what becomes of their update, too."""
    config = ModelConfig(groups="mod_moe_2t2i", dim=16, layers=2, heads=2, norm=norm)
    model, graphs = Transformer(config, VOCABULARY, (0.5, 0.5), dispatch=dispatch), []
    model.initialize(0)

    def record(graph, inputs):
        names = (str(node.target).split(".")[-1] for node in graph.graph.nodes)
        graphs.append({name.split(" ")[-1].rstrip(">") for name in names})
        return graph.forward

    tokens, routing = mixed_tokens(2, 15, 0), Routing(record_selection=True)
    expected = model(tokens, routing=routing)
    torch.compiler.reset()
    layer = next(model.units())
    assert isinstance(layer, DecoderLayer)
    layer.compile_around_experts(fullgraph=True, dynamic=False, backend=record)
    found = model(tokens, routing=routing)
    torch.testing.assert_close(found.head, expected.head)
    for own, other in zip(found.routers, expected.routers, strict=True):
        assert torch.equal(own.selected_NE, other.selected_NE)
    before, after = graphs
    assert {"topk", "argsort", "scaled_dot_product_attention"} <= before
    assert {"isfinite", "index_copy"} <= after
    assert ("scatter_add" in after) == (dispatch is ScatterSlots)


def test_a_causal_mask_ignores_documents():
    model = build("dense", attention_mask="causal")
    tokens = mixed_tokens(1, 8, 0)
    documents = torch.tensor([[0] * 4 + [1] * 4])
    torch.testing.assert_close(model(tokens, documents).head, model(tokens).head, rtol=0, atol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_a_sequence_without_documents_is_one_segment(padded, monkeypatch):
    """A prompt to continue; one segment for each token would be slow on a GPU."""
    found = []
    layout = MaskedAttention.layout

    def recording(self, segments, dtype):
        found.append(segments)
        return layout(self, segments, dtype)

    monkeypatch.setattr(MaskedAttention, "layout", recording)
    tokens = mixed_tokens(3, 8, 0)
    if padded:
        tokens[1, 5:] = VOCABULARY.padding
    build("moe_2t2i")(tokens)
    (segments,) = found
    assert segments.is_whole and segments.max_segments == 3
    assert segments.id_RS.tolist() == [[number] * 8 for number in range(3)]


def test_initialization_depends_only_on_the_seed():
    first, same, other = build("moe_2t2i"), build("moe_2t2i"), build("moe_2t2i")
    other.initialize(1)
    for a, b in zip(first.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert first.embedding.weight.std().item() == pytest.approx(1, rel=0.2)
    experts = first.get_submodule("layers.0.experts.groups.0")
    assert isinstance(experts, ExpertGroup)
    router = experts.router.weight
    assert router.sum(0).abs().max().item() < 1e-5 < router.abs().max().item()
    depth = build("mod").get_submodule("layers.0.depth.router").get_parameter("weight")
    assert depth.std().item() == pytest.approx(16**-0.5, rel=0.5)
    assert experts.gate.std().item() == pytest.approx(16**-0.5, rel=0.2)
    assert experts.down.std().item() == pytest.approx(first.config.hidden_width**-0.5, rel=0.2)


def test_a_model_is_built_on_the_device_of_the_context():
    """As `moma bench generate` does on a GPU."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(groups="mod_null_2t2i", layers=2), VOCABULARY, (0.5, 0.5))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_shares_must_add_up():
    with pytest.raises(ValueError, match="add up to 1"):
        Transformer(ModelConfig(dim=16, heads=2), VOCABULARY, (0.5, 0.4))


def test_tied_embeddings_are_one_table_at_the_heads_scale():
    model = build("dense", tied_embeddings=True)
    assert model.head.weight is model.embedding.weight
    assert model.embedding.weight.std().item() == pytest.approx(16**-0.5, rel=0.2)
    tokens = mixed_tokens(2, 8, 0)
    (read,) = inputs_of(model.layers[0], lambda: model(tokens))
    torch.testing.assert_close(read, 4 * model.embedding.weight[tokens])


def inputs_of(module, run):
    found = []
    handle = module.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    run()
    handle.remove()
    return found


def test_dropout_is_active_only_in_training():
    model = build("mod_moe_2t2i", dropout=0.5)
    tokens = mixed_tokens(2, 8, 0)
    assert torch.equal(model(tokens).head, build("mod_moe_2t2i")(tokens).head)
    model.train()
    torch.manual_seed(0)
    first, second = model(tokens).head, model(tokens).head
    torch.manual_seed(0)
    assert torch.equal(first, model(tokens).head) and not torch.equal(first, second)


@pytest.mark.parametrize("norm", ["swin", "pre"])
@pytest.mark.parametrize("groups", ["dense", "mod"])
@pytest.mark.parametrize("zeroed", ["attention.output", "experts.groups.0.feed_forward.down"])
def test_dropout_acts_on_the_outputs_of_attention_and_experts(groups, norm, zeroed):
    """With one of them zeroed, each number of the other's output is dropped or doubled."""
    model = build(groups, dropout=0.5, norm=norm)
    model.layers = model.layers[:1]
    layer = model.layers[0]
    torch.nn.init.zeros_(layer.get_submodule(zeroed).get_parameter("weight"))
    tokens = mixed_tokens(8, 8, 0)
    read = model.embedding(tokens)
    added = []
    torch.manual_seed(0)
    for training in (False, True):
        model.train(training)
        (found,) = inputs_of(model.norm, lambda: model(tokens))
        added.append((found - read)[(found != read).any(-1)])
    whole, dropped = added
    kept = dropped != 0
    assert 0.4 < kept.float().mean().item() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * whole[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", ["mod_moe_2t2i", "moe_4x", "moe_1t1i"])
def test_the_embedding_of_padding_has_no_effect(groups):
    model = build(groups)
    tokens = mixed_tokens(2, 8, 0)
    tokens[1, 3:] = VOCABULARY.padding
    documents = torch.where(tokens == VOCABULARY.padding, -1, 0)
    outputs = []
    for value in (0.0, 100.0):
        with torch.no_grad():
            model.embedding.weight[VOCABULARY.padding] = value
        for routing in (
            Routing(),
            uniform_routing(ExpertChoice("actual")),
            uniform_routing(Auxiliary()),
        ):
            outputs.append(model(tokens, documents, routing=routing).head[documents >= 0])
    for before, after in zip(outputs[:3], outputs[3:], strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("router", "detected_by"),
    [
        ("layers.1.experts.groups.0.router", (CHOICE, ACTUAL, RECORD, CAUSAL)),
        ("layers.2.depth.router", (CHOICE, ACTUAL, RECORD, CAUSAL)),
        ("layers.1.experts.groups.0.auxiliary.output", (RECORD, CAUSAL)),
        ("layers.2.depth.auxiliary.output", (RECORD, CAUSAL)),
    ],
)
def test_a_nonfinite_logit_is_reported_with_its_layer(router, detected_by, value):
    config = ModelConfig(groups="mod_moe_2t2i", dim=16, layers=4, heads=2)
    model = Transformer(config, VOCABULARY, (0.5, 0.5)).eval()
    model.initialize(0)
    tokens = mixed_tokens(2, 8, 0)
    assert not model(tokens, routing=RECORD).nonfinite_L.any()
    with torch.no_grad():
        model.get_parameter(f"{router}.weight")[0, 0] = value
    layer = int(router.split(".")[1])
    for routing in (CHOICE, ACTUAL, RECORD, CAUSAL):
        if routing in (ACTUAL, CAUSAL) and routing in detected_by:
            with pytest.raises(UserError, match=f"output of layer {layer}, or a logit of a router"):
                model(tokens, routing=routing)
        else:
            found = model(tokens, routing=routing).nonfinite_L.nonzero().flatten().tolist()
            assert found[:1] == ([layer] if routing in detected_by else [])


@pytest.mark.parametrize("groups", ARCHITECTURES)
def test_models_with_routers_have_auxiliary_routers(groups):
    model = build(groups)
    assert model.config.has_expert_choice == bool(list(model.auxiliary_routers()))
