"""The engine: many requests at once, each as if it were alone, from a queue."""

import asyncio
import threading
import time
from dataclasses import replace

import pytest

from moma.errors import UserError
from moma.generate.decode import Decoder, NewTokens
from moma.generate.guidance import Guidance
from moma.generate.mixed import MixedModel
from moma.generate.sampling import Sampling
from moma.generate.settings import Settings
from moma.generate.stream import Content, ImagePart, TextPiece, collect
from moma.serve.answer import Answer
from moma.serve.engine import BusyError, Engine, EngineStoppedError
from tests.serve.models import ask, comparable, make_mixed, noise

LONG = Settings("text", Sampling(temperature=0))
REQUESTS: list[tuple[list[Content], Settings]] = [
    (["the"], Settings("mixed", Sampling(1.5, 1.0, seed=1))),
    ([noise(1, (40, 30)), "red"], Settings("image", Sampling(1.0), images=3)),
    (["red ", noise(2)], Settings("image", Sampling(seed=4), guidance=Guidance(3, 1.2))),
    (["apple"], Settings("text", Sampling(2.0, seed=2), new_tokens=7)),
    (["the red"], Settings("text", Sampling(3.0, seed=3), stop=["e", "a"])),
]


def test_answers_are_those_of_lone_requests(mixed):
    with Engine(mixed, max_active=3) as engine:
        answers = [ask(engine, prompt, settings) for prompt, settings in REQUESTS]
        found = [collect(answer) for answer in answers]
    for answer, content, (prompt, settings) in zip(answers, found, REQUESTS, strict=True):
        (expected,) = mixed.generate([prompt], settings)
        assert comparable(content) == comparable(expected)
        assert answer.prompt_tokens == len(mixed.encode(prompt))
        assert answer.first and answer.ended
        assert answer.submitted <= answer.first <= answer.ended
    assert [answer.end for answer in answers][1:3] == ["stop", "stop"]
    assert answers[3].new_tokens <= 7
    assert engine.total_tokens == sum(answer.new_tokens for answer in answers)


def test_answers_are_read_by_an_async_loop(mixed):
    async def read(answer):
        return collect([event async for event in answer])

    async def read_all(engine):
        return await asyncio.gather(*(read(ask(engine, *each)) for each in REQUESTS))

    with Engine(mixed) as engine:
        found = asyncio.run(read_all(engine))
    for content, (prompt, settings) in zip(found, REQUESTS, strict=True):
        assert comparable(content) == comparable(mixed.generate([prompt], settings)[0])


def test_rows_of_unfinished_images_come_if_they_are_wanted(mixed, monkeypatch):
    step, settings = Decoder.step, Settings("image", Sampling(1.0), drafts=0)

    def sizes(has_rows):
        engine = Engine(mixed)
        answer = ask(engine, ["the"], settings, has_rows)

        def step_once_all_is_read(decoder: Decoder) -> list[NewTokens]:
            while answer.has_unread:  # it would be joined
                time.sleep(0.001)
            return step(decoder)

        monkeypatch.setattr(Decoder, "step", step_once_all_is_read)
        with engine:
            return {event.image.size for event in answer if isinstance(event, ImagePart)}

    assert sizes(False) == {(16, 16)}
    assert sizes(True) == {(16, 8), (16, 16)}


def test_what_is_not_read_is_joined():
    answer = Answer(1, lambda _: None)
    rows, whole = ImagePart(noise(1), False), ImagePart(noise(2), True)
    for event in (TextPiece("a"), TextPiece("b"), rows, rows, whole, whole, TextPiece("c"), rows):
        answer.add(1, [event])
    answer.finish("stop")
    answer.add(1, [TextPiece("late")])
    answer.finish("error", UserError("late"))
    assert list(answer) == [TextPiece("ab"), whole, whole, TextPiece("c"), rows]
    assert (answer.end, answer.error, answer.new_tokens) == ("stop", None, 8)


def test_a_full_queue_refuses_and_a_cancelled_request_frees_its_place(mixed):
    engine = Engine(mixed, max_active=1, max_queued=1)
    answers = [ask(engine, ["the"], LONG) for _ in range(2)]
    assert engine.queued == 2
    with pytest.raises(BusyError, match="it generates 1 requests at a time, and 1 may wait"):
        ask(engine, ["the"], LONG)
    answers[0].cancel()
    answers[0].cancel()
    assert (answers[0].end, engine.queued) == ("cancelled", 1)
    answers.append(ask(engine, ["red"], LONG))
    with engine:
        assert list(answers[0]) == []
        assert [collect(answer) for answer in answers[1:]] == mixed.generate(
            [["the"], ["red"]], LONG
        )
    assert (engine.queued, engine.active) == (0, 0)


def test_a_request_that_is_being_generated_can_be_cancelled(never_ending):
    with Engine(never_ending, max_active=1, max_queued=1) as engine:
        first = ask(engine, ["the"], LONG)
        assert isinstance(next(iter(first)), TextPiece)
        second = ask(engine, ["red"], Settings("text", new_tokens=3))
        assert (engine.active, engine.queued) == (1, 1)
        first.cancel()
        list(second)
        assert (first.end, second.end, second.new_tokens) == ("cancelled", "length", 3)


def test_a_cancelled_request_is_not_computed_any_more(never_ending):
    batches = []
    hook = never_ending.model.register_forward_pre_hook(
        lambda _, inputs: batches.append(len(inputs[0]))
    )
    try:
        with Engine(never_ending, max_active=2) as engine:
            first = ask(engine, ["the"], LONG)
            assert isinstance(next(iter(first)), TextPiece)
            first.cancel()
            list(ask(engine, ["red"], Settings("text", new_tokens=3)))
    finally:
        hook.remove()
    assert batches[-3:] == [1, 1, 1]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (["zzz " * 99], Settings("text"), "context of 64 tokens leaves only"),
        ([noise(0)] * 11, Settings("text"), "context of 64 tokens leaves only"),
        (["the"], Settings("image", images=11), "besides 11 images"),
        (["the"], Settings("image", new_tokens=5), "at most 5 new tokens: an image has 6"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_at_once(mixed, prompt, settings, message):
    with pytest.raises(UserError, match=message):
        ask(Engine(mixed), prompt, settings)


def test_images_are_decoded_once_the_prompt_is_known_to_fit(mixed):
    def read(image):
        raise AssertionError("an image was decoded")

    with pytest.raises(UserError, match="context of 64 tokens leaves only"):
        Engine(mixed).submit(["zzz " * 99, noise(0)], [LONG], read=read)


def test_an_error_ends_only_its_own_request(mixed):
    image = Settings("image", Sampling(0))
    bad = replace(image, guidance=Guidance(3e38, 1))
    engine = Engine(mixed)
    answers = [ask(engine, ["the"], settings) for settings in (LONG, bad, LONG, image)]
    with engine:  # only now, so that the first pass has all of them
        with pytest.raises(UserError, match="logits are NaN"):
            list(answers[1])
        assert answers[1].end == "error"
        first, second, last = (comparable(collect(answers[number])) for number in (0, 2, 3))
        assert engine.error is None
    assert first == second == comparable(mixed.generate([["the"]], LONG)[0])
    assert last == comparable(mixed.generate([["the"]], image)[0])


def test_an_error_of_the_thread_reaches_every_request(tmp_path):
    mixed = make_mixed(tmp_path)
    mixed.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with Engine(mixed, max_active=1) as engine:
        answers = [ask(engine, ["the"], LONG) for _ in range(2)]
        for answer in answers:
            with pytest.raises(EngineStoppedError, match="has failed; the server's log says why"):
                list(answer)
        with pytest.raises(EngineStoppedError, match="has failed; the server's log"):
            ask(engine, ["the"], LONG)
    assert isinstance(engine.error, ZeroDivisionError)


def test_a_closed_engine_cancels_its_requests(never_ending):
    with Engine(never_ending, max_active=1) as engine:
        answers = [ask(engine, ["the"], LONG) for _ in range(2)]
        next(iter(answers[0]))
    assert [answer.end for answer in answers] == ["cancelled", "cancelled"]
    with pytest.raises(EngineStoppedError, match="shutting down"):
        ask(engine, ["the"], LONG)


def test_many_threads_submit_read_and_cancel(mixed):
    expected = mixed.generate([["the"]], LONG)[0]
    found = []

    def use(engine, number):
        for _ in range(3):
            answer = ask(engine, ["the"], LONG)
            if number % 2:
                answer.cancel()
            found.append((number, answer.end, collect(answer), answer.end))

    with Engine(mixed, max_active=3, max_queued=99) as engine:
        threads = [threading.Thread(target=use, args=(engine, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 24
    assert all(content == expected for _, _, content, end in found if end != "cancelled")
    assert all(content == expected for number, _, content, _ in found if not number % 2)
    assert (engine.active, engine.queued) == (0, 0)


def test_a_prompt_of_several_answers_is_encoded_once(mixed, monkeypatch):
    encoded, codes = [], MixedModel.codes

    def counted(self, image):
        encoded.append(image)
        return codes(self, image)

    seeds = [replace(LONG, sampling=Sampling(5.0, 1.0, seed=seed)) for seed in range(3)]
    expected = [mixed.generate([["the", noise(1)]], settings)[0] for settings in seeds]
    with Engine(mixed, max_active=2) as engine:
        monkeypatch.setattr(MixedModel, "codes", counted)
        found = [collect(answer) for answer in engine.submit(["the", noise(1)], seeds)]
    assert found == expected and len(set(map(str, found))) == 3
    assert len(encoded) == 1


def test_numbers_that_are_too_small_are_refused(mixed):
    with pytest.raises(UserError, match="max_active 0, max_queued 1: must be at least 1 and 0"):
        Engine(mixed, 0, 1)
