"""Decoding against the obvious way: one prompt at a time, a full forward for every token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.errors import UserError
from moma.generate.decode import Sampling, draw, generate
from moma.generate.grammar import Grammar
from moma.model.routing import Routing
from moma.model.transformer import ModelConfig, Transformer
from moma.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    size=40,
    beginning=0,
    end=1,
    padding=2,
    begin_image=3,
    end_image=4,
    image_codes=tuple(range(30, 40)),
    codes_per_image=4,
)
IMAGE = [3, 30, 35, 31, 39, 4]
PROMPTS = [[0], [0, 10, 11, 12, 13, 14, 15], [0, *IMAGE, 20], [0, 9, *IMAGE, 8, *IMAGE[:3]]]
GREEDY = Sampling(temperature=0)


def make_model(groups="moe_2t2i", seed=0):
    config = ModelConfig(dim=32, layers=2, heads=2, groups=groups)
    model = Transformer(config, VOCABULARY, (0.5, 0.5))
    model.initialise(seed)
    return model.eval()


@torch.no_grad()
def slow_greedy(model, prompt, mode, context, new_tokens):
    """The likeliest allowed token of a full causal forward over one sequence, again and again."""
    grammar = Grammar(VOCABULARY, mode)
    for token in prompt:
        grammar.advance(token)
    tokens = list(prompt)
    answer: list[int] = []
    while len(tokens) < context and len(answer) < new_tokens:
        logits_V = model(torch.tensor([tokens]), routing=Routing(mode="causal")).logits_BSV[0, -1]
        allowed = grammar.allowed().nonzero()[0].tolist()
        token = max(allowed, key=lambda id_: float(logits_V[id_]))
        tokens.append(token)
        answer.append(token)
        grammar.advance(token)
        if grammar.ends_with(token):
            break
    return answer


@pytest.mark.parametrize("mode", ["text", "image", "mixed"])
@pytest.mark.parametrize("groups", ["moe_2t2i", "dense", "moe_1t1i"])
def test_greedy_decoding_side_by_side_equals_slow_decoding_alone(groups, mode):
    model = make_model(groups)
    # The slow way does not know how much room is left for an image, and has enough of it.
    room = VOCABULARY.image_span if mode == "mixed" else 0
    answers = generate(model, PROMPTS, mode, 40, 12 + room, GREEDY)
    expected = [slow_greedy(model, prompt, mode, 40, 12) for prompt in PROMPTS]
    assert [answer[:12] for answer in answers] == expected
    # Otherwise the comparison would say little.
    assert len({tuple(answer) for answer in answers}) > 1


@pytest.mark.parametrize("seed", range(4))
def test_a_prompt_gets_the_same_answer_in_any_company(seed):
    model = make_model(seed=seed)
    alone = [generate(model, [prompt], "mixed", 30, 10, GREEDY)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, "mixed", 30, 10, GREEDY) == alone
    backwards = generate(model, PROMPTS[::-1], "mixed", 30, 10, GREEDY)
    assert backwards == alone[::-1]


def test_auxiliary_routers_decide():
    model = make_model()
    before = generate(model, PROMPTS, "text", 30, 12, GREEDY)
    with torch.no_grad():
        for router in model.auxiliary_routers():
            router.output.weight.zero_()  # nobody is likely to take anything
    assert generate(model, PROMPTS, "text", 30, 12, GREEDY) != before


def test_an_answer_stops_at_the_context_and_at_the_limit():
    model = make_model()
    with torch.no_grad():
        model.head.weight[VOCABULARY.end] = 0
        model.head.weight[20] = 0
        model.head.weight[21] = 0
    lengths = [len(answer) for answer in generate(model, PROMPTS, "text", 20, 100, GREEDY)]
    full = [20 - len(prompt) for prompt in PROMPTS]
    assert all(length <= most for length, most in zip(lengths, full, strict=True))
    assert any(length == most for length, most in zip(lengths, full, strict=True))
    assert all(len(answer) <= 3 for answer in generate(model, PROMPTS, "text", 20, 3, GREEDY))


def test_image_answers_are_whole_images():
    for answer in generate(make_model(), PROMPTS[:3], "image", 30, 30, Sampling(temperature=2)):
        assert len(answer) == VOCABULARY.image_span
        assert (answer[0], answer[-1]) == (VOCABULARY.begin_image, VOCABULARY.end_image)
        assert set(answer[1:-1]) <= set(VOCABULARY.image_codes)


@pytest.mark.parametrize("mode", ["text", "mixed", "image"])
def test_a_prompt_without_room_for_an_answer_is_refused(mode):
    model = make_model()
    room = VOCABULARY.image_span if mode == "image" else 1
    longest = [0, *[10] * (20 - room - 1)]
    assert len(generate(model, [longest], mode, 20, 20, GREEDY)[0]) == room
    told = rf"{len(longest) + 1} tokens, and the context of 20 has room for {len(longest)} beside"
    with pytest.raises(UserError, match=told):
        generate(model, [[0], [*longest, 10]], mode, 20, 20, GREEDY)


def test_an_image_is_never_opened_without_room_to_close_it():
    model = make_model()
    for seed in range(20):
        sampling = Sampling(temperature=50, top_p=1, seed=seed)
        for answer in generate(model, [[0]] * 8, "mixed", 16, 16, sampling):
            opened, closed = (answer.count(id_) for id_ in (3, 4))
            assert opened == closed


def test_the_seed_decides_the_draws():
    model = make_model()

    def answers(seed):
        return generate(model, PROMPTS, "text", 30, 12, Sampling(temperature=1, seed=seed))

    assert answers(1) == answers(1)
    assert len({str(answers(seed)) for seed in range(5)}) > 1


def test_the_draws_leave_the_global_random_numbers_alone():
    model = make_model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate(model, PROMPTS, "text", 30, 5, Sampling(temperature=1))
    assert torch.equal(torch.rand(3), expected)


def nucleus(chances, top_p):
    """The likeliest tokens, taken until they hold `top_p`."""
    order = sorted(range(len(chances)), key=lambda token: -chances[token])
    chosen, held = set(), 0.0
    for token in order:
        chosen.add(token)
        held += chances[token]
        if held >= top_p:
            return chosen
    return chosen


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 1000), min_size=2, max_size=12, unique=True),
    st.floats(0.05, 1.0),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_draws_come_from_the_nucleus_alone(counts, top_p, temperature):
    logits_V = torch.tensor(counts, dtype=torch.float64).log()
    chances = (logits_V / temperature).softmax(-1).tolist()
    drawn = draw(
        logits_V.repeat(300, 1),
        Sampling(temperature, top_p),
        torch.Generator().manual_seed(0),
    )
    # A sum that meets top_p exactly may be rounded either way.
    allowed = nucleus(chances, top_p) | nucleus(chances, top_p + 1e-9)
    assert set(drawn.tolist()) <= allowed


def test_the_whole_nucleus_is_drawn_in_proportion():
    chances = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])
    sampling = Sampling(temperature=1, top_p=0.85)
    drawn = draw(chances.log().repeat(20_000, 1), sampling, torch.Generator().manual_seed(0))
    found = drawn.bincount(minlength=5) / 20_000
    # 0.4 + 0.3 + 0.2 are the first to reach 0.85.
    expected = torch.tensor([0, 0.4, 0, 0.3, 0.2]) / 0.9
    assert torch.allclose(found, expected, atol=0.02)
    assert found[0] == found[2] == 0


def test_a_small_nucleus_is_the_likeliest_token():
    logits_BV = torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    drawn = draw(logits_BV, Sampling(1.0, 1e-6), torch.Generator().manual_seed(0))
    assert torch.equal(drawn, logits_BV.argmax(-1))
    assert torch.equal(drawn, draw(logits_BV, GREEDY, torch.Generator()))


def test_forbidden_tokens_are_never_drawn():
    logits_BV = torch.zeros(500, 6)
    logits_BV[:, [0, 4]] = -torch.inf
    drawn = draw(logits_BV, Sampling(1.0, 1.0), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1, 2, 3, 5}
