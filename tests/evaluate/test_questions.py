"""Visual questions and multiple choice against slow references, and malformed rows."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from moma.errors import UserError
from moma.evaluate.suite import run_suite
from moma.runtime.world import World
from moma.tokenizers.text import encode_text
from tests.evaluate.reference import mixed_of, slow_nats


@pytest.fixture(scope="module")
def mixed(tiny):
    return mixed_of(tiny)


@pytest.fixture
def ask(mixed, tiny, tmp_path):
    """Measures of a suite on rows; `1.png` is an image beside them."""
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1.png")

    def ask(suite, *rows):
        file = tmp_path / "test.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        world = World(torch.device("cpu"))
        return run_suite(suite, mixed, tiny.data, world, file, quiet=True)["sources"]["test"]

    return ask


def image(tmp_path):
    return Image.open(tmp_path / "1.png").convert("RGB")


def test_visual_questions_score_the_answer(mixed, ask, tmp_path):
    rows = [("What is it?", "a red square"), ("Is it red?", "no")]
    nats, tokens = 0.0, 0
    for question, answer in rows:
        target = encode_text(mixed.tokenizer, f" {answer}")
        nats += slow_nats(mixed.model, mixed.encode([image(tmp_path), question]), target)
        tokens += len(target)
    found = ask(
        "visual_questions",
        *({"image": "1.png", "question": text, "answer": answer} for text, answer in rows),
    )
    assert found["documents"] == 2
    assert found["perplexity"]["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_multiple_choice_by_likelihood(mixed, ask, tmp_path):
    """Long choices, so that those of the highest likelihood, and per character, differ."""
    choices = ["no", "the red square of green paper on it", "is blue"]
    rows, expected = [], []
    for number, has_image in enumerate((False, True, False, False)):
        prompt = [image(tmp_path)] if has_image else []
        nats = [
            slow_nats(
                mixed.model,
                mixed.encode([*prompt, f"number {number}"]),
                encode_text(mixed.tokenizer, f" {choice}"),
            )
            for choice in choices
        ]
        row = {"question": f"number {number}", "choices": choices, "answer": (0, 0, 1, 0)[number]}
        rows.append(row | ({"image": "1.png"} if has_image else {}))
        per_character = [each / len(choice) for each, choice in zip(nats, choices, strict=True)]
        best = [int(np.argmin(each)) == row["answer"] for each in (nats, per_character)]
        expected.append(best)
    found = ask("multiple_choice", *rows)
    measured = [found[key]["value"] for key in ("accuracy", "accuracy_normalized")]
    assert measured == pytest.approx(np.mean(expected, axis=0))
    assert measured[0] != measured[1]


QUESTION = {"question": "Which?", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("suite", "row", "message"),
    [
        ("multiple_choice", {}, "needs a text under 'question'"),
        ("multiple_choice", QUESTION | {"answer": 2}, "'answer' must be the number"),
        ("multiple_choice", QUESTION | {"answer": True}, "'answer' must be the number"),
        ("multiple_choice", QUESTION | {"answer": "a"}, "'answer' must be the number"),
        ("multiple_choice", QUESTION | {"choices": ["a"]}, "'choices' must be a list of at least"),
        ("multiple_choice", QUESTION | {"choices": ["a", " "]}, "'choices' contains an empty text"),
        ("multiple_choice", QUESTION | {"image": "2.png"}, "there is no"),
        ("multiple_choice", QUESTION | {"question": "x" * 99}, "the model reads at most 65"),
        ("visual_questions", QUESTION, "needs a text under 'image'"),
        ("visual_questions", {"image": "../1.png", "question": "?", "answer": "a"}, "outside"),
        ("visual_questions", {"image": "1.png", "question": "?"}, "needs a text under 'answer'"),
    ],
)
def test_malformed_row_is_named(ask, suite, row, message):
    answer = {"answer": "a"} if suite == "visual_questions" else {}
    good = QUESTION | {"image": "1.png"} | answer
    with pytest.raises(UserError, match=rf"test\.jsonl, row 2: .*{message}"):
        ask(suite, good, row)


def test_file_without_questions(ask):
    with pytest.raises(UserError, match=r"test\.jsonl: has no questions"):
        ask("multiple_choice")
