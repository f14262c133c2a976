"""Questions in JSON Lines: visual questions, and multiple choice by likelihood.

{"image": "1.jpg", "question": "What is it?", "answer": "a cat"}
{"question": "The sky is", "choices": ["blue", "green"], "answer": 0}
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moma.data.sources.jsonl import Line, read_jsonl, require_text
from moma.data.sources.paths import FileRange, expand_pattern, resolve_inside
from moma.data.sources.reading import check_text
from moma.errors import UserError
from moma.evaluate.score import ScoredSequence, with_target
from moma.evaluate.suites import Subject, Suite, credit
from moma.evaluate.summary import Record, exponential, identity
from moma.generate.stream import Content
from moma.images import read_image
from moma.tokenizers.text import encode_text


class Question(NamedTuple):
    """A question about an image, or about none.

    Attributes:
        row: location in the file, for messages.
        source: name of the file.
        right: position of the right one.
    """

    row: str
    source: str
    image: Path | None
    text: str
    choices: list[str]
    right: int


def visual_questions(subject: Subject) -> Suite:
    """Perplexity of the answers to questions about images."""
    questions = _read(subject.path, "visual_questions", has_choices=False)

    def measure(part: Sequence[Question]) -> list[Record]:
        scores = subject.score([each for one in part for each in _sequences(subject, one)])
        found = [each.log_likelihood_T for each in scores]
        return [
            Record(question.source, {"perplexity": (-nats_T.sum(), len(nats_T))})
            for question, nats_T in zip(part, found, strict=True)
        ]

    return Suite(questions, measure, {"perplexity": exponential})


def multiple_choice(subject: Subject) -> Suite:
    """Accuracy of choosing the answer of the highest log-likelihood.

    `accuracy_normalized`: of the highest log-likelihood per character.
    """
    questions = _read(subject.path, "multiple_choice", has_choices=True)

    def measure(part: Sequence[Question]) -> list[Record]:
        scores = subject.score([each for one in part for each in _sequences(subject, one)])
        found = iter(scores)
        records = []
        for question in part:
            choices = question.choices
            sums = np.array([next(found).log_likelihood_T.sum() for _ in choices])
            right = {
                "accuracy": credit(sums, question.right),
                "accuracy_normalized": credit(sums / [*map(len, choices)], question.right),
            }
            records.append(Record(question.source, {name: (x, 1) for name, x in right.items()}))
        return records

    return Suite(questions, measure, dict.fromkeys(("accuracy", "accuracy_normalized"), identity))


def _sequences(subject: Subject, question: Question) -> list[ScoredSequence]:
    """Image, question and each of the choices, which are scored."""
    prompt: list[Content] = [question.text]
    if question.image is not None:
        prompt.insert(0, read_image(question.image, question.row))
    ids = subject.mixed.encode(prompt)
    tokenizer, context = subject.mixed.tokenizer, subject.mixed.context
    answers = [encode_text(tokenizer, f" {choice}") for choice in question.choices]
    longest = len(ids) + max(map(len, answers))
    if longest > context + 1:
        raise UserError(
            f"{question.row}: has {longest} tokens with its answer, and the model reads at most "
            f"{context + 1}; shorten or remove it"
        )
    return [with_target(ids, answer) for answer in answers]


def _read(path: Path | None, suite: str, has_choices: bool) -> list[Question]:
    if path is None:
        raise UserError(f"--suite {suite}: needs --from: a JSON Lines file of questions")
    found = []
    for line in read_jsonl(map(FileRange, expand_pattern(path))):
        try:
            found.append(_parse(line, has_choices))
        except UserError as error:
            raise UserError(f"{line.location}: {error}") from error
    if not found:
        raise UserError(f"{path}: has no questions; write one JSON object per line")
    return found


def _parse(line: Line, has_choices: bool) -> Question:
    values = line.values()
    file = Path(line.path)
    image = None
    if not has_choices or values.get("image") is not None:
        image = resolve_inside(file.parent, require_text(values, "image"))
    text = require_text(values, "question")
    if not has_choices:
        answer = require_text(values, "answer")
        return Question(line.location, file.stem, image, text, [answer], 0)
    choices, right = _choices(values.get("choices")), values.get("answer")
    # Numbers are read as floats.
    if not isinstance(right, float) or right not in range(len(choices)):
        raise UserError(
            f"'answer' must be the number of the right choice, from 0 to {len(choices) - 1}"
        )
    return Question(line.location, file.stem, image, text, choices, int(right))


def _choices(value: Any) -> list[str]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(x, str) for x in value):
        raise UserError("'choices' must be a list of at least two texts; fix or remove the row")
    if not all(choice.strip() for choice in value):
        raise UserError("'choices' contains an empty text; fix or remove the row")
    return [check_text(choice, "under 'choices'") for choice in value]
