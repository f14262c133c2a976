"""Forward passes with caches against one forward pass over the whole sequence."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moma.model.caches import Caches
from moma.model.decoding import prepare_decoding
from moma.model.depth import DepthConfig, DepthRouter
from moma.model.routing import Auxiliary, Half, Routing, Threshold, uniform_routing
from moma.model.transformer import ModelConfig, Transformer
from tests.factories import make_vocabulary, set_thresholds

VOCABULARY = make_vocabulary(codes=range(30, 40))
PADDING = VOCABULARY.padding
CAUSAL = uniform_routing(Auxiliary())
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "dense": {"groups": "dense"},
    "moe_1t1i": {"groups": "moe_1t1i"},
    "moe_3t1i": {"groups": "moe_3t1i", "norm": "pre"},
    "moe_4x": {"groups": "moe_4x", "tied_embeddings": True},
    "moe_2t2i": {"groups": "moe_2t2i", "kv_heads": 2, "experts_implementation": "batched"},
    "mod": {"groups": "mod", "kv_heads": 1},
    "mod_moe_1t1i": {"groups": "mod_moe_1t1i", "query_key_norm": False},
    "mod_moe_2t2i": {"groups": "mod_moe_2t2i", "attention_mask": "causal"},
    "token_4x": {"groups": "token_4x"},
    "mod_null_2t2i": {"groups": "mod_null_2t2i", "experts_implementation": "batched"},
    "by_modality": {
        "groups": "moe_2t1i",
        "depth": DepthConfig(modality_factors={"text": 0.75, "image": 0.5}),
    },
    "all_depth": {"groups": "moe_2t1i", "depth": DepthConfig(layers=(0, 1, 2), scope="sequence")},
}


def build(name: str, seed: int = 0, for_cpu: bool = False) -> Transformer:
    config = ModelConfig(dim=32, layers=3, heads=4, **ARCHITECTURES[name])
    model = Transformer(config, VOCABULARY, (0.5, 0.5))
    model.initialize(seed)
    set_thresholds(model, some_tokens(torch.Generator().manual_seed(seed + 1), 60).view(4, 15))
    if for_cpu:
        prepare_decoding(model)
    return model.eval()


def some_tokens(random: torch.Generator, length: int) -> Tensor:
    """Text and image ids in any order, without padding."""
    ids = torch.tensor([id_ for id_ in range(40) if id_ != PADDING])
    return ids[torch.randint(len(ids), (length,), generator=random)]


def append(
    model: Transformer, caches: Caches, parts: list[Tensor], routing: Routing = CAUSAL
) -> list[Tensor]:
    """Append tokens to each sequence, as one padded batch, and return their logits."""
    padded_BS = pad_sequence(parts, True, PADDING).to(model.embedding.weight.device)
    logits_BSV = model(padded_BS, routing=replace(routing, checks=False), caches=caches).head
    return [logits_SV[: len(part)] for logits_SV, part in zip(logits_BSV, parts, strict=True)]


@pytest.mark.parametrize("policy", [Auxiliary(), Threshold()])
@pytest.mark.parametrize("for_cpu", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=3),
    st.integers(0, 999),
)
@torch.no_grad()
def test_cached_passes_equal_one_pass_over_the_whole_sequence(name, for_cpu, policy, sizes, seed):
    routing = uniform_routing(policy)
    model, random = build(name, seed, for_cpu), torch.Generator().manual_seed(seed)
    sizes = [[first + 1, *others] for first, *others in sizes]
    sequences = [some_tokens(random, sum(parts)) for parts in sizes]
    caches = model.new_caches(len(sequences))
    parts = [list(each.split(part)) for each, part in zip(sequences, sizes, strict=True)]
    passes = [
        append(model, caches, list(part), routing)
        for part in zip(*parts, strict=True)
        if max(map(len, part))
    ]
    for number, sequence in enumerate(sequences):
        expected_SV = model(sequence[None], routing=routing).head[0]
        found_SV = torch.cat([each[number] for each in passes])
        torch.testing.assert_close(found_SV, expected_SV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("for_cpu", [False, True])
@pytest.mark.parametrize("depth", [Threshold(), Half()])
@torch.no_grad()
def test_depth_routers_with_a_threshold_for_each_modality(for_cpu, depth):
    model, random = build("by_modality", 3, for_cpu=False), torch.Generator().manual_seed(3)
    sequence = some_tokens(random, 24)
    for router in model.routers():
        size = router.cutoff_means_3E.shape[1]
        router.cutoff_means_3E.copy_(
            torch.stack((torch.linspace(-2, 2, size), *torch.ones(2, size)))
        )
    routing = Routing(Threshold(), depth)
    expected_SV = model(sequence[None], routing=routing).head[0]
    if for_cpu:
        prepare_decoding(model)
    caches, unchecked = model.new_caches(1), replace(routing, checks=False)
    found = [
        model(token[None], routing=unchecked, caches=caches).head[0] for token in sequence.split(5)
    ]
    torch.testing.assert_close(torch.cat(found), expected_SV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("name", ["moe_2t2i", "mod_moe_2t2i"])
@torch.no_grad()
def test_a_cache_grows(name, waits):
    model, random = build(name), torch.Generator().manual_seed(1)
    sequences = [some_tokens(random, 150), some_tokens(random, 90)]
    caches = Caches(model.config, 2, torch.device("cpu"), waits)
    append(model, caches, [sequence[:-10] for sequence in sequences])
    for number in range(10, 0, -1):
        parts = [sequence[len(sequence) - number :][:1] for sequence in sequences]
        found = append(model, caches, parts)
    for sequence, logits_1V in zip(sequences, found, strict=True):
        expected_SV = model(sequence[None], routing=CAUSAL).head[0]
        torch.testing.assert_close(logits_1V[0], expected_SV[-1], rtol=1e-4, atol=1e-4)


def set_depth_routers(model: Transformer, value: float) -> None:
    """Let them select no token if the value is 0, else those whose features have its sign."""
    for module in model.modules():
        if isinstance(module, DepthRouter):
            module.auxiliary.hidden.weight.fill_(1.0)
            module.auxiliary.output.weight.fill_(value)


@pytest.mark.parametrize("for_cpu", [False, True])
@torch.no_grad()
def test_depth_routers_that_select_nothing_or_many_tokens(for_cpu):
    for value in (-100.0, 0.0, 100.0):
        model, random = build("mod_moe_2t2i", for_cpu=for_cpu), torch.Generator().manual_seed(2)
        set_depth_routers(model, value)
        sequence = some_tokens(random, 9)
        caches = model.new_caches(1)
        found = [append(model, caches, [token])[0] for token in sequence.split(1)]
        expected_SV = model(sequence[None], routing=CAUSAL).head[0]
        torch.testing.assert_close(torch.cat(found), expected_SV, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_is_as_long_as_its_sequences_though_the_device_is_not_waited_for():
    model, random = build("moe_2t2i"), torch.Generator().manual_seed(5)
    caches = Caches(model.config, 1, torch.device("cpu"), waits=False)
    for _ in range(20):
        append(model, caches, [some_tokens(random, 10)])
        other = Caches(model.config, 1, torch.device("cpu"), waits=False)
        append(model, other, [some_tokens(random, 10)])
        caches.select([])
        caches.extend(other)
    assert caches.layers[0].key_BTGC.shape[1] <= 64


@pytest.mark.parametrize("name", ["dense", "moe_2t2i", "mod", "mod_moe_2t2i", "all_depth"])
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 3), st.integers(0, 999), st.booleans(), st.booleans(), st.data())
@torch.no_grad()
def test_tokens_can_be_taken_back(name, count, seed, for_cpu, waits, data):
    model, random = build(name, seed, for_cpu), torch.Generator().manual_seed(seed)
    firsts = [some_tokens(random, data.draw(st.integers(1, 5))) for _ in range(count)]
    drafts = [some_tokens(random, 4) for _ in range(count)]
    kept = [data.draw(st.integers(0, 4)) for _ in range(count)]
    lasts = [some_tokens(random, 2) for _ in range(count)]
    caches = Caches(model.config, count, torch.device("cpu"), waits)
    append(model, caches, firsts)
    append(model, caches, drafts)
    caches.keep(kept)
    found = append(model, caches, lasts)
    for first, draft, number, last, logits_SV in zip(
        firsts, drafts, kept, lasts, found, strict=True
    ):
        whole = torch.cat((first, draft[:number], last))
        expected_SV = model(whole[None], routing=CAUSAL).head[0, -2:]
        torch.testing.assert_close(logits_SV, expected_SV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["moe_2t2i", "mod_moe_2t2i"])
@torch.no_grad()
def test_sequences_can_be_dropped_and_reordered(name):
    model, random = build(name), torch.Generator().manual_seed(3)
    sequences = [some_tokens(random, length) for length in (4, 6, 2)]
    caches = model.new_caches(3)
    append(model, caches, sequences)
    caches.select([2, 0])
    new = [some_tokens(random, 1), some_tokens(random, 1)]
    found = append(model, caches, new)
    for before, token, logits_1V in zip((sequences[2], sequences[0]), new, found, strict=True):
        expected_SV = model(torch.cat((before, token))[None], routing=CAUSAL).head[0]
        torch.testing.assert_close(logits_1V[0], expected_SV[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth_router", [None, 0.0])
@pytest.mark.parametrize("lengths", [(4, 70), (70, 4), (1, 2)])
@pytest.mark.parametrize("name", ["moe_2t2i", "mod_moe_2t2i"])
@torch.no_grad()
def test_sequences_can_be_added(name, lengths, depth_router):
    model, random = build(name), torch.Generator().manual_seed(3)
    if depth_router is not None:
        set_depth_routers(model, depth_router)
    sequences = [some_tokens(random, length) for length in lengths]
    caches = model.new_caches(0)
    for sequence in sequences:
        added = model.new_caches(1)
        append(model, added, [sequence])
        caches.extend(added)
    new = [some_tokens(random, 1), some_tokens(random, 1)]
    found = append(model, caches, new)
    for before, token, logits_1V in zip(sequences, new, found, strict=True):
        expected_SV = model(torch.cat((before, token))[None], routing=CAUSAL).head[0]
        torch.testing.assert_close(logits_1V[0], expected_SV[-1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_skipped_tokens_leave_nothing_in_a_layer():
    model, random = build("mod"), torch.Generator().manual_seed(4)
    kept: list[int] = []
    depth_router = next(module for module in model.modules() if isinstance(module, DepthRouter))
    depth_router.register_forward_hook(lambda *args: kept.append(int(args[2][0].filled_EK.sum())))
    caches = model.new_caches(1)
    for length in (9, 1, 1):
        append(model, caches, [some_tokens(random, length)])
    assert 0 < sum(kept) < 11
    lengths = [layer.lengths.length_B.tolist() for layer in caches.layers]
    assert lengths[:2] == [[sum(kept)], [11]]
