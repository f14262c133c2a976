"""Requests with options of their own, decoded together, and leaving at any time."""

import math

import pytest
import torch

from moma.errors import UserError
from moma.generate.decode import Decoder, decode
from moma.generate.sampling import Sampling
from moma.generate.sequence import Branch, Options, Request
from tests.generate.test_decode import GREEDY, IMAGE, PROMPTS, make_model

DIFFERENT = [
    Options("text", 40, 9, GREEDY),
    Options("text", 40, 7, Sampling(1.0, 0.9, top_k=5)),
    Options("image", 50, 40, Sampling(1.0), images=3, drafts=3),
    Options("mixed", 30, 20, Sampling(2.0, 1.0), image_sampling=GREEDY, drafts=1),
    Options("text", 40, 12, Sampling(0.5, repetition_penalty=50)),
    Options("mixed", 40, 14, GREEDY, image_sampling=Sampling(repetition_penalty=9), drafts=2),
    Options("text", 40, 12, Sampling(1.0), stop=lambda tokens: len(tokens) == 3),
]


def different_requests():
    requests = [
        Request([Branch(PROMPTS[number % 3])], options, number)
        for number, options in enumerate(DIFFERENT)
    ]
    requests[2] = requests[2]._replace(branches=[Branch([0, 9, *IMAGE], 3.0), Branch([0], -2.0)])
    return requests


def answers_of(model, requests, batch=None):
    answers = {number: list[int]() for number, _ in requests}
    for number, tokens, _ in decode(model, requests, batch):
        answers[number] += tokens
    return answers


@pytest.mark.parametrize("groups", ["moe_2t2i", "mod_moe_2t1i"])
def test_a_request_does_not_depend_on_neighbors_with_other_options(groups):
    model, requests = make_model(groups), list(enumerate(different_requests()))
    alone: dict[int, list[int]] = {}
    for request in requests:
        alone |= answers_of(model, [request])
    assert answers_of(model, requests) == alone
    assert answers_of(model, requests[::-1], batch=3) == alone
    assert len({tuple(answer) for answer in alone.values()}) > 4


@pytest.mark.parametrize("groups", ["moe_2t2i", "mod_moe_2t1i"])
def test_cancelled_requests_leave_the_others_as_they_are(groups):
    model, requests = make_model(groups), different_requests()
    expected = answers_of(model, list(enumerate(requests)))
    decoder, found = Decoder(model), {number: list[int]() for number in range(len(requests))}
    for number, request in enumerate(requests):
        decoder.add(number, request)
    decoder.cancel(0)  # before its prompt is read
    cancelled, steps = {0}, 0
    while len(decoder):
        for number, tokens, _ in decoder.step():
            assert number not in cancelled
            found[number] += tokens
        steps += 1
        if steps == 2:
            decoder.cancel(2)
            decoder.cancel(99)  # there is none
            cancelled.add(2)
    assert 0 < len(found[2]) < len(expected[2])
    for number in expected.keys() - cancelled:
        assert found[number] == expected[number]


def test_a_request_says_why_it_ended():
    model = make_model()
    requests = [
        Request([Branch([0])], Options("image", 40, 40, GREEDY)),
        Request([Branch([0])], Options("image", 40, 3, GREEDY)),
        Request([Branch([0])], Options("text", 40, 9, GREEDY, stop=lambda tokens: True)),
        Request([Branch([0, 3])], Options("mixed", 40, 1, GREEDY)),
    ]
    ends = {number: end for number, _, end in decode(model, enumerate(requests)) if end}
    assert ends == {0: "stop", 1: "length", 2: "stop", 3: "length"}


@pytest.mark.parametrize("weights", [(1e39, -1e39), (1e39, 0.0)], ids=["nan", "infinite"])
@torch.no_grad()
def test_a_request_whose_logits_are_not_finite_fails_alone(weights):
    model = make_model()
    text = Request([Branch([0, 10])], Options("text", 40, 6, GREEDY))
    image = Request([Branch([0, 10])], Options("image", 40, 20, GREEDY))
    branches = [Branch(*each) for each in zip(([0, 10], [0]), weights, strict=True)]
    guided = image._replace(branches=branches)
    expected = answers_of(model, [(1, text), (2, image)])
    decoder, found = Decoder(model), {1: list[int](), 2: list[int]()}
    for number, request in enumerate((guided, text, image)):
        decoder.add(number, request)
    first = decoder.step()
    assert isinstance(first[0].end, UserError) and "logits are NaN" in str(first[0].end)
    steps = [first, *iter(lambda: decoder.step() if len(decoder) else None, None)]
    for new in (each for step in steps for each in step if each.number):
        found[new.number] += new.tokens
    assert found == expected
    model.head.weight[35] = math.nan
    with pytest.raises(UserError, match="logits are NaN"):
        answers_of(model, [(0, image)])
