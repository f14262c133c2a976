"""Decoding against a slow reference: one prompt at a time, a full forward pass per token."""

import math
from dataclasses import replace

import pytest
import torch

from moma.errors import UserError
from moma.generate.decode import decode
from moma.generate.grammar import Grammar
from moma.generate.sampling import Sampling, gumbel_noise
from moma.generate.sequence import DRAFTS, Branch, Options, Request
from moma.model.routing import ROUTINGS
from moma.model.transformer import ModelConfig, Transformer
from tests.factories import make_vocabulary, set_thresholds
from tests.generate.allowed import allowed_ids

VOCABULARY = make_vocabulary(codes=range(30, 40))
IMAGE = [3, 30, 35, 31, 39, 4]
PROMPTS = [[0], [0, 10, 11, 12, 13, 14, 15], [0, *IMAGE, 20], [0, 9, *IMAGE, 8, *IMAGE[:3]]]
GREEDY = Sampling(temperature=0)
ONE = [Branch([0, 10, 11])]


def make_model(groups="moe_2t2i", seed=0):
    config = ModelConfig(dim=32, layers=2, heads=2, groups=groups)
    model = Transformer(config, VOCABULARY, (0.5, 0.5))
    model.initialize(seed)
    random = torch.Generator().manual_seed(seed + 1)
    set_thresholds(model, torch.randint(5, VOCABULARY.size, (4, 16), generator=random))
    return model.eval()


def generate(model, prompts, mode, context, new_tokens, sampling):
    """Continue prompts, each with a seed of its own, and return the new tokens of each."""
    options = Options(mode, context, new_tokens, sampling)
    return run(model, options, [[Branch(prompt)] for prompt in prompts], sampling.seed)[0]


@torch.no_grad()
def slow_greedy(model, prompt, mode, context, new_tokens):
    """Repeatedly append the most likely allowed token of a full causal forward pass."""
    grammar = Grammar(VOCABULARY, mode)
    for token in prompt:
        grammar.advance(token)
    tokens = list(prompt)
    new: list[int] = []
    while len(tokens) < context and len(new) < new_tokens:
        logits_V = model(torch.tensor([tokens]), routing=model.causal_routing).head[0, -1]
        allowed = allowed_ids(grammar)
        token = max(allowed, key=lambda id_: float(logits_V[id_]))
        tokens.append(token)
        new.append(token)
        grammar.advance(token)
        if grammar.ends_with(token):
            break
    return new


@pytest.mark.parametrize("mode", ["text", "image", "mixed"])
@pytest.mark.parametrize("routing", ["auxiliary", "threshold"])
@pytest.mark.parametrize("groups", ["moe_2t2i", "dense", "mod_moe_2t1i", "mod_null_2t2i"])
def test_batched_greedy_decoding_equals_decoding_one_prompt_at_a_time(groups, routing, mode):
    model = make_model(groups)
    model.causal_routing = ROUTINGS[routing]
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


@pytest.mark.parametrize("routing", ["auxiliary", "threshold"])
def test_decoding_uses_the_causal_routing(routing):
    model = make_model()
    model.causal_routing = ROUTINGS[routing]
    before = generate(model, PROMPTS, "text", 30, 12, GREEDY)
    with torch.no_grad():  # no expert selects a token
        for auxiliary in model.auxiliary_routers():
            auxiliary.output.weight.mul_(routing != "auxiliary")
        for router in model.routers():
            router.cutoff_means_3E[0].add_(100 * (routing == "threshold"))
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


def test_a_limit_below_one_new_token_is_refused():
    with pytest.raises(UserError, match="new_tokens 0: must be at least 1"):
        generate(make_model(), PROMPTS, "text", 40, 0, GREEDY)


def run(model, options, prompts=None, seed=0):
    """Return the continuations of prompts, each with a seed of its own, and the number of passes.

    Prompts are lists of branches.
    """
    prompts = prompts or [[Branch(prompt)] for prompt in PROMPTS]
    return run_requests(
        model, [Request(branches, options, seed + n) for n, branches in enumerate(prompts)]
    )


def run_requests(model, requests):
    """Return the continuations, and the number of passes."""
    passes: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    answers: list[list[int]] = [[] for _ in requests]
    for number, tokens, _ in decode(model, enumerate(requests)):
        answers[number] += tokens
    hook.remove()
    return answers, len(passes)


@pytest.mark.parametrize("mode", ["image", "mixed"])
@pytest.mark.parametrize("groups", ["moe_2t2i", "dense", "mod_moe_2t1i"])
@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize(
    ("seeds", "numbers"),
    [(range(2), (1, 7)), pytest.param(range(3), (1, 2, 7), marks=pytest.mark.slow)],
)
def test_drafts_change_nothing_but_the_number_of_passes(groups, mode, temperature, seeds, numbers):
    model = make_model(groups)
    sampling = Sampling(temperature, top_p=0.9)
    plain = Options(mode, 60, 30, sampling, images=2, drafts=0)
    requests = [Request([Branch(p)], plain, seed) for seed in seeds for p in PROMPTS[:3]]
    expected, passes = run_requests(model, requests)
    for drafts in numbers:
        options = replace(plain, drafts=drafts)
        found, fewer = run_requests(model, [each._replace(options=options) for each in requests])
        assert found == expected
        assert fewer <= passes


def predictable_model(groups="moe_2t2i"):
    """One code is always the most likely, or never."""
    model = make_model(groups)
    with torch.no_grad():
        model.head.weight[35] *= 100
        model.head.weight[[code for code in range(30, 40) if code != 35]] = 0
    return model


def test_correct_drafts_save_passes():
    model = predictable_model()
    options = Options("image", 60, 30, GREEDY, images=3, drafts=0)
    (_, passes), (_, fewer) = run(model, options), run(model, replace(options, drafts=3))
    assert fewer < passes


@pytest.mark.parametrize(
    ("groups", "alone"),
    [("dense", DRAFTS), ("moe_1t1i", DRAFTS), ("moe_2t2i", 0), ("token_4x", 0), ("mod", 0)],
)
def test_by_default_a_sequence_that_is_alone_has_drafts_if_nothing_is_routed(groups, alone):
    model, prompts = predictable_model(groups), [[Branch([0, 8])], [Branch([0, 9])]]

    def passes(prompts, *drafts):
        options = Options("image", 60, 30, GREEDY, None, 3, *drafts)
        return run(model, options, prompts)[1]

    assert passes(prompts[:1]) == passes(prompts[:1], alone)
    assert passes(prompts[:1], DRAFTS) < passes(prompts[:1], 0)
    guided = [[Branch([0, 8], 2.0), Branch([0], -1.0)]]
    for several in (prompts, guided):
        assert passes(several) == passes(several, 0) > passes(several, DRAFTS)


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("groups", ["moe_2t2i", "mod_moe_2t1i"])
@torch.no_grad()
def test_guidance_equals_separate_passes_over_each_prompt(groups, drafts):
    model = make_model(groups)
    branches = [Branch([0, 9, *IMAGE, 20, 21], 3.0), Branch([0, *IMAGE], -1.8), Branch([0], -0.2)]
    options = Options("image", 60, 30, Sampling(1.0, 1.0), drafts=drafts)
    plain = Request([Branch([0, 8])], options, 1)
    (answer, other), _ = run_requests(model, [Request(branches, options, 5), plain])
    assert other == run_requests(model, [plain])[0][0]
    codes: list[int] = []
    for number in range(VOCABULARY.codes_per_image):
        logits_V = sum(
            weight
            * model(torch.tensor([[*prompt, 3, *codes]]), routing=model.causal_routing).head[0, -1]
            for prompt, weight in branches
        )
        noise = gumbel_noise(5, len(branches[0].prompt) + 1 + number, 10)
        codes.append(30 + int((logits_V[30:40] + noise).argmax()))
    assert answer == [3, *codes, 4]


def test_several_images_are_generated():
    (answer,), _ = run(make_model(), Options("image", 40, 40, GREEDY, images=3), [ONE])
    assert answer.count(3) == answer.count(4) == 3
    assert len(answer) == 3 * VOCABULARY.image_span
    with pytest.raises(UserError, match="besides 9 images"):
        run(make_model(), Options("image", 40, 40, GREEDY, images=9), [ONE])


def test_tokens_are_returned_as_they_come():
    model = make_model()
    options = Options("mixed", 40, 24, Sampling(1.0))
    prompts = [ONE, [Branch(PROMPTS[1])]]
    requests = [(5 + seed, Request(each, options, seed)) for seed, each in enumerate(prompts)]
    parts = list(decode(model, requests))
    assert {part.number for part in parts} == {5, 6}
    assert all(1 <= len(part.tokens) <= 2 for part in parts)
    assert [part.number for part in parts if part.end] == list(
        dict.fromkeys(part.number for part in reversed(parts))
    )[::-1]


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("groups", ["moe_2t2i", "mod_moe_2t1i"])
def test_requests_take_the_places_of_complete_ones(groups, drafts):
    model = make_model(groups)
    options = Options("mixed", 18, 18, Sampling(1.0, top_p=1), drafts=drafts)
    requests = [Request([Branch(p)], options, seed) for seed in range(3) for p in PROMPTS[:3]]
    requests[4] = Request([Branch(PROMPTS[0], 2.0), Branch([0], -1.0)], options, 7)
    running: set[int] = set()
    sizes: list[int] = []

    def take():
        for number, request in enumerate(requests):
            running.add(number)
            sizes.append(len(running))
            yield number, request

    answers: list[list[int]] = [[] for _ in requests]
    for number, tokens, end in decode(model, take(), batch=2):
        answers[number] += tokens
        if end:
            running.remove(number)
    assert answers == run_requests(model, requests)[0]
    assert not running and max(sizes) == 2
    assert sizes.count(2) > sizes.count(1)  # most did not wait until both had ended


def test_a_stop_condition_ends_a_continuation():
    options = Options("text", 40, 30, GREEDY)
    models = (make_model(seed=seed) for seed in range(20))
    model, whole = next(
        (model, whole) for model in models if len(whole := run(model, options, [ONE])[0][0]) > 4
    )
    seen = []

    def stop(tokens):
        seen.append(list(tokens))
        return len(tokens) >= 2 and tokens[-1] == whole[3]

    (answer,), _ = run(model, replace(options, stop=stop), [ONE])
    assert answer == whole[: whole.index(whole[3], 1) + 1]
    assert seen == [answer[:count] for count in range(1, len(answer) + 1)]  # without the prompt


def test_text_and_images_can_be_sampled_differently():
    model = make_model()
    hot = Sampling(temperature=50, top_p=1)
    options = Options("image", 40, 40, hot, image_sampling=GREEDY)
    assert run(model, options)[0] == run(model, replace(options, sampling=GREEDY))[0]
    assert run(model, options)[0] != run(model, replace(options, image_sampling=hot))[0]


@pytest.mark.parametrize("groups", ["dense", "mod_moe_2t1i"])
def test_a_repetition_penalty_counts_the_tokens_of_its_modality(groups):
    model = make_model(groups)
    penalty = Sampling(0, repetition_penalty=100)
    text, _ = run(model, Options("text", 40, 12, penalty))
    assert all(len(set(answer)) == len(answer) for answer in text)
    options = Options("image", 40, 12, GREEDY, image_sampling=penalty, drafts=2)
    (codes, *_), _ = run(model, options, [ONE])
    assert len(set(codes)) == len(codes)


def test_logits_that_are_nan_are_refused():
    model = make_model()
    with torch.no_grad():
        model.head.weight[35] = math.nan
    with pytest.raises(UserError, match="logits are NaN"):
        run(model, Options("image", 40, 40, GREEDY))


@pytest.mark.parametrize("groups", ["dense", "moe_1t1i", "moe_2t1i", "mod_moe_2t2i"])
def test_a_model_in_bf16_generates(groups):
    model = make_model(groups).to(torch.bfloat16)
    (answer, *_), _ = run(model, Options("mixed", 40, 12, Sampling(1.0), drafts=2))
    assert answer
