"""Decoding against a slow reference: one prompt at a time, a full forward pass per token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.errors import UserError
from moma.generate.decode import Sampling, generate, sample
from moma.generate.grammar import Grammar
from moma.model.routing import Routing
from moma.model.transformer import ModelConfig, Transformer
from tests.factories import make_vocabulary

VOCABULARY = make_vocabulary(codes=range(30, 40))
IMAGE = [3, 30, 35, 31, 39, 4]
PROMPTS = [[0], [0, 10, 11, 12, 13, 14, 15], [0, *IMAGE, 20], [0, 9, *IMAGE, 8, *IMAGE[:3]]]
GREEDY = Sampling(temperature=0)


def make_model(groups="moe_2t2i", seed=0):
    config = ModelConfig(dim=32, layers=2, heads=2, groups=groups)
    model = Transformer(config, VOCABULARY, (0.5, 0.5))
    model.initialize(seed)
    return model.eval()


@torch.no_grad()
def slow_greedy(model, prompt, mode, context, new_tokens):
    """Repeatedly append the most likely allowed token of a full causal forward pass."""
    grammar = Grammar(VOCABULARY, mode)
    for token in prompt:
        grammar.advance(token)
    tokens = list(prompt)
    new: list[int] = []
    while len(tokens) < context and len(new) < new_tokens:
        logits_V = model(torch.tensor([tokens]), routing=Routing(mode="causal")).head[0, -1]
        allowed = grammar.allowed().nonzero()[0].tolist()
        token = max(allowed, key=lambda id_: float(logits_V[id_]))
        tokens.append(token)
        new.append(token)
        grammar.advance(token)
        if grammar.ends_with(token):
            break
    return new


@pytest.mark.parametrize("mode", ["text", "image", "mixed"])
@pytest.mark.parametrize("groups", ["moe_2t2i", "dense", "moe_1t1i"])
def test_batched_greedy_decoding_equals_decoding_one_prompt_at_a_time(groups, mode):
    model = make_model(groups)
    # The slow reference does not limit images to the remaining tokens, so leave space for one.
    space = VOCABULARY.image_span if mode == "mixed" else 0
    answers = generate(model, PROMPTS, mode, 40, 12 + space, GREEDY)
    expected = [slow_greedy(model, prompt, mode, 40, 12) for prompt in PROMPTS]
    assert [answer[:12] for answer in answers] == expected
    # The comparison needs different continuations.
    assert len({tuple(answer) for answer in answers}) > 1


@pytest.mark.parametrize("seed", range(4))
def test_a_continuation_does_not_depend_on_the_other_prompts(seed):
    model = make_model(seed=seed)
    separate = [generate(model, [prompt], "mixed", 30, 10, GREEDY)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, "mixed", 30, 10, GREEDY) == separate
    backwards = generate(model, PROMPTS[::-1], "mixed", 30, 10, GREEDY)
    assert backwards == separate[::-1]


def test_decoding_uses_the_auxiliary_routers():
    model = make_model()
    before = generate(model, PROMPTS, "text", 30, 12, GREEDY)
    with torch.no_grad():
        for router in model.auxiliary_routers():
            router.output.weight.zero_()  # no expert selects a token
    assert generate(model, PROMPTS, "text", 30, 12, GREEDY) != before


def test_a_continuation_stops_at_the_context_and_at_new_tokens():
    model = make_model()
    with torch.no_grad():
        model.head.weight[VOCABULARY.end] = 0
        model.head.weight[20] = 0
        model.head.weight[21] = 0
    lengths = [len(answer) for answer in generate(model, PROMPTS, "text", 20, 100, GREEDY)]
    full = [20 - len(prompt) for prompt in PROMPTS]
    assert all(length <= limit for length, limit in zip(lengths, full, strict=True))
    assert any(length == limit for length, limit in zip(lengths, full, strict=True))
    assert all(len(answer) <= 3 for answer in generate(model, PROMPTS, "text", 20, 3, GREEDY))


def test_image_mode_generates_complete_images():
    for answer in generate(make_model(), PROMPTS[:3], "image", 30, 30, Sampling(temperature=2)):
        assert len(answer) == VOCABULARY.image_span
        assert (answer[0], answer[-1]) == (VOCABULARY.begin_image, VOCABULARY.end_image)
        assert set(answer[1:-1]) <= set(VOCABULARY.image_codes)


@pytest.mark.parametrize("mode", ["text", "mixed", "image"])
def test_a_prompt_that_fills_the_context_is_refused(mode):
    model = make_model()
    space = VOCABULARY.image_span if mode == "image" else 1
    longest = [0, *[10] * (20 - space - 1)]
    assert len(generate(model, [longest], mode, 20, 20, GREEDY)[0]) == space
    message = rf"{len(longest) + 1} tokens, but the context of 20 tokens leaves only {len(longest)}"
    with pytest.raises(UserError, match=message):
        generate(model, [[0], [*longest, 10]], mode, 20, 20, GREEDY)


def test_an_image_begins_only_if_it_fits():
    model = make_model()
    for seed in range(20):
        sampling = Sampling(temperature=50, top_p=1, seed=seed)
        for answer in generate(model, [[0]] * 8, "mixed", 16, 16, sampling):
            opened, closed = (answer.count(id_) for id_ in (3, 4))
            assert opened == closed


def test_the_seed_determines_the_samples():
    model = make_model()

    def answers(seed):
        return generate(model, PROMPTS, "text", 30, 12, Sampling(temperature=1, seed=seed))

    assert answers(1) == answers(1)
    assert len({str(answers(seed)) for seed in range(5)}) > 1


def test_sampling_does_not_use_the_global_generator():
    model = make_model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate(model, PROMPTS, "text", 30, 5, Sampling(temperature=1))
    assert torch.equal(torch.rand(3), expected)


def nucleus(probabilities, top_p):
    """The most likely tokens that together have probability `top_p`."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    tokens, total = set(), 0.0
    for token in order:
        tokens.add(token)
        total += probabilities[token]
        if total >= top_p:
            return tokens
    return tokens


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 1000), min_size=2, max_size=12, unique=True),
    st.floats(0.05, 1.0),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_samples_are_in_the_nucleus(counts, top_p, temperature):
    logits_V = torch.tensor(counts, dtype=torch.float64).log()
    probabilities = (logits_V / temperature).softmax(-1).tolist()
    sampled = sample(
        logits_V.repeat(300, 1),
        Sampling(temperature, top_p),
        torch.Generator().manual_seed(0),
    )
    # A sum that meets top_p exactly may be rounded either way.
    allowed = nucleus(probabilities, top_p) | nucleus(probabilities, top_p + 1e-9)
    assert set(sampled.tolist()) <= allowed


def test_the_nucleus_is_sampled_in_proportion():
    probabilities = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])
    sampling = Sampling(temperature=1, top_p=0.85)
    sampled = sample(
        probabilities.log().repeat(20_000, 1), sampling, torch.Generator().manual_seed(0)
    )
    found = sampled.bincount(minlength=5) / 20_000
    # 0.4 + 0.3 + 0.2 are the first to reach 0.85.
    expected = torch.tensor([0, 0.4, 0, 0.3, 0.2]) / 0.9
    assert torch.allclose(found, expected, atol=0.02)
    assert found[0] == found[2] == 0


def test_a_small_nucleus_is_the_most_likely_token():
    logits_BV = torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    sampled = sample(logits_BV, Sampling(1.0, 1e-6), torch.Generator().manual_seed(0))
    assert torch.equal(sampled, logits_BV.argmax(-1))
    assert torch.equal(sampled, sample(logits_BV, GREEDY, torch.Generator()))


def test_masked_tokens_are_never_sampled():
    logits_BV = torch.zeros(500, 6)
    logits_BV[:, [0, 4]] = -torch.inf
    sampled = sample(logits_BV, Sampling(1.0, 1.0), torch.Generator().manual_seed(0))
    assert set(sampled.tolist()) == {1, 2, 3, 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 1e-40}, "temperature 1e-40: must be 0"),
        ({"temperature": -0.5}, "temperature -0.5: must be 0"),
        ({"temperature": math.nan}, "temperature nan: must be 0"),
        ({"temperature": math.inf}, "temperature inf: must be 0"),
        ({"temperature": 1e39}, r"temperature 1e\+39: must be 0"),
        ({"temperature": 10**400}, "must be 0 .* or finite"),
        ({"temperature": "1"}, "temperature '1': must be a number"),
        ({"top_p": 0}, "top_p 0: must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p 1.01: must be above 0"),
        ({"top_p": math.nan}, "top_p nan: must be above 0"),
        ({"top_p": -math.inf}, "top_p -inf: must be above 0"),
        ({"seed": -1}, "seed -1: must be a whole number from 0 to 4294967295"),
        ({"seed": 99999999999999999999}, "seed 99999999999999999999: must be a whole number"),
        ({"seed": 1.5}, "seed 1.5: must be a whole number"),
    ],
)
def test_sampling_numbers_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Sampling(**changes)


@pytest.mark.parametrize("temperature", [1e-6, 1e30])
def test_extreme_temperatures_sample_allowed_tokens(temperature):
    logits_BV = torch.tensor([[1e4, -1e4, -torch.inf, 9e3]]).repeat(20, 1)
    sampled = sample(logits_BV, Sampling(temperature, 1.0, 2**32 - 1), torch.Generator())
    assert set(sampled.tolist()) <= ({0} if temperature < 1 else {0, 1, 3})


def test_a_limit_below_one_new_token_is_refused():
    with pytest.raises(UserError, match="new_tokens 0: must be at least 1"):
        generate(make_model(), PROMPTS, "text", 40, 0, GREEDY)
