"""Every key of `clean` has an effect: each test fails if its key is ignored."""

import json
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from pydantic import ValidationError

from moma.data.cleaning import filters, functions
from moma.data.cleaning.config import CleaningConfig
from moma.data.cleaning.filters import filters_fingerprint, make_filter
from moma.data.cleaning.ngrams import ngrams
from moma.data.cleaning.passes import provide_cleaning
from moma.data.documents import Document, DroppedImageError, Rejected, SourceConfig
from moma.errors import UserError
from tests.factories import solid_image, write_captions

ENGLISH = "The manual describes every tool of the program in detail, with many examples."
GERMAN = "Das Handbuch beschreibt jedes Werkzeug des Programms ausführlich und mit Beispielen."


def shout(document):
    """A user's function: drops what is secret, and changes the rest."""
    if "secret" in document.name:
        return "it is secret"
    if document.name == "broken":
        raise ValueError("no idea")
    if document.name == "wrong":
        return None
    if document.name == "no reason":
        return " "
    if document.name in ("no text", "no name"):
        wrong: dict[str, Any] = {"no text": ("a", (3,)), "no name": (None, ("a",))}
        return Document(*wrong[document.name])
    return Document(document.name, (document.segments[0].upper(),))


class Shouts:
    def __call__(self, document):
        return shout(document)


SHOUTS = Shouts()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    entries = [
        EntryPoint("shout", "tests.data.cleaning.test_keys:shout", "moma.cleaning"),
        EntryPoint("object", "tests.data.cleaning.test_keys:SHOUTS", "moma.cleaning"),
        EntryPoint("gone", "tests.no_module:shout", "moma.cleaning"),
    ]

    def entry_points(group, name=None):
        assert group == "moma.cleaning"
        return [entry for entry in entries if name in (None, entry.name)]

    monkeypatch.setattr(functions, "entry_points", entry_points)


class Listed(SourceConfig):
    kind: str = "listed"
    name: str = "listed"
    texts: tuple[str, ...] = ()
    colors: tuple[str, ...] = ()

    def documents(self):
        yield from (Document(str(n), (text,)) for n, text in enumerate(self.texts))
        yield from (Document(color, ("a", solid_image(color), "b")) for color in self.colors)


def filtered(*segments, name="doc", **keys):
    return make_filter(CleaningConfig(**keys))(Document(name, segments))


def dropped_by(*segments, **keys):
    """The key that drops a document, or an image of it, if one does."""
    row = filtered(*segments, **keys)
    if isinstance(row, Rejected):
        return row.dropped_by
    for part in row.segments:
        try:
            part if isinstance(part, str) else part.read()
        except DroppedImageError as error:
            return error.rejected.dropped_by
    return None


def compared(folder, texts=(), colors=(), **keys):
    """How many documents, or images in them, are dropped as duplicates."""
    source = Listed(texts=texts, colors=colors, clean=CleaningConfig(**keys))
    rows = provide_cleaning([source], folder / str(keys))["listed"].rows(source.documents())
    return sum(isinstance(row, Rejected) or has_dropped_image(row) for row in rows)


def has_dropped_image(document):
    try:
        for part in document.segments:
            if not isinstance(part, str):
                part.read()
    except DroppedImageError:
        return True
    return False


def function_keeps_changes_or_drops(tmp_path):
    assert filtered("quiet", function="shout") == Document("doc", ("QUIET",))
    assert filtered("quiet") == Document("doc", ("quiet",))
    reason = "clean.function: it is secret"
    dropped = filtered("quiet", name="a secret", function="shout")
    assert dropped == Rejected("a secret", reason, "function")


def min_image_side_is_of_the_shorter_side(tmp_path):
    image = solid_image("red", (9, 5))
    assert [dropped_by(image, min_image_side=side) for side in (5, 6)] == [None, "min_image_side"]


def max_aspect_ratio_is_of_long_to_short(tmp_path):
    for size in ((30, 10), (10, 30)):
        found = [dropped_by(solid_image("red", size), max_aspect_ratio=ratio) for ratio in (3, 2.9)]
        assert found == [None, "max_aspect_ratio"]


def languages_are_those_that_are_kept(tmp_path):
    assert dropped_by(ENGLISH, languages=["en"]) is None
    assert dropped_by(GERMAN, languages=["en"]) == "languages"
    assert dropped_by(GERMAN, languages=["en", "de"]) is None
    assert dropped_by(solid_image("red"), languages=["en"]) is None


def min_language_probability_drops_what_is_uncertain(tmp_path):
    keys = {"languages": ["en"], "min_language_probability": 0.6}
    assert dropped_by(ENGLISH, **keys) is None
    assert dropped_by("a red apple", **keys) == "languages"
    assert dropped_by("a red apple", languages=["en"]) is None


def questions(folder):
    file = folder / "questions.jsonl"
    rows = [
        {"question": "Which of the four colors is warm?", "choices": ["blue", "red"], "answer": 1},
        {"question": "What is to be seen here?", "image": "1.png", "answer": "a cat"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def evaluation_files_are_found_in_documents(tmp_path):
    file = questions(tmp_path)
    keys = {"evaluation_files": [file], "evaluation_ngram": 4}
    text = "He asked: which of the four colors is warm? Red, I think."
    assert filtered(text, **keys).reason.endswith(f"it contains {file}, row 1")
    assert dropped_by("What is to be seen here? A dog.", **keys) == "evaluation_files"
    assert dropped_by("Four colors of the rainbow are warm.", **keys) is None


def evaluation_ngram_is_the_length(tmp_path):
    keys = {"evaluation_files": [questions(tmp_path)]}
    text = "which of the 4 colors is warm is not what is to be seen there"
    found = [dropped_by(text, evaluation_ngram=n, **keys) for n in (1, 6)]
    assert found == ["evaluation_files", None]


def evaluation_overlap_is_the_fraction(tmp_path):
    keys = {"evaluation_files": [questions(tmp_path)], "evaluation_ngram": 1}
    text = "what is to be found with a cat"  # 6 of 8
    found = [dropped_by(text, evaluation_overlap=overlap, **keys) for overlap in (0.75, 0.76)]
    assert found == ["evaluation_files", None]


def duplicate_texts_drops_equal_texts(tmp_path):
    texts = ("one", "one ", "two")
    found = [compared(tmp_path, texts, duplicate_texts=on) for on in (False, True)]
    assert found == [0, 1]


def near_duplicate_texts_is_the_similarity(tmp_path):
    texts = (ENGLISH, ENGLISH + " Indeed.")
    keys = {"near_duplicate_ngram": 1}
    found = [compared(tmp_path, texts, near_duplicate_texts=t, **keys) for t in (1, 0.6)]
    assert found == [0, 1]


def near_duplicate_ngram_is_the_length(tmp_path):
    texts = ("a b c d e f g h", "h g f e d c b a")
    keys = {"near_duplicate_texts": 0.9}
    found = [compared(tmp_path, texts, near_duplicate_ngram=n, **keys) for n in (1, 2)]
    assert found == [1, 0]


def duplicate_images_drops_equal_images(tmp_path):
    colors = ("red", "red", "blue")
    found = [compared(tmp_path, colors=colors, duplicate_images=on) for on in (False, True)]
    assert found == [0, 1]


def near_duplicate_images_is_the_distance(tmp_path):
    colors = ("red", "blue")  # of one color, and so of one hash
    found = [compared(tmp_path, colors=colors, near_duplicate_images=n) for n in (None, 0)]
    assert found == [0, 1]


TESTS = {
    "function": function_keeps_changes_or_drops,
    "min_image_side": min_image_side_is_of_the_shorter_side,
    "max_aspect_ratio": max_aspect_ratio_is_of_long_to_short,
    "languages": languages_are_those_that_are_kept,
    "min_language_probability": min_language_probability_drops_what_is_uncertain,
    "evaluation_files": evaluation_files_are_found_in_documents,
    "evaluation_ngram": evaluation_ngram_is_the_length,
    "evaluation_overlap": evaluation_overlap_is_the_fraction,
    "duplicate_texts": duplicate_texts_drops_equal_texts,
    "near_duplicate_texts": near_duplicate_texts_is_the_similarity,
    "near_duplicate_ngram": near_duplicate_ngram_is_the_length,
    "duplicate_images": duplicate_images_drops_equal_images,
    "near_duplicate_images": near_duplicate_images_is_the_distance,
}


def test_every_key_has_a_test():
    assert TESTS.keys() == CleaningConfig.model_fields.keys()


@pytest.mark.parametrize("key", TESTS)
def test_key(key, tmp_path):
    TESTS[key](tmp_path)


def test_evaluation_files_may_be_captions_documents_or_sources(tmp_path):
    write_captions(tmp_path / "images", {"1.png": "two cats on a sofa"}, {})
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"segments": [{"type": "text", "text": "a dog in the rain"}]}\n')
    (tmp_path / "list.toml").write_text(f'sources = [{{kind = "interleaved", path = "{rows}"}}]\n')
    for name, text in (("images", "two cats"), ("rows.jsonl", "a dog"), ("list.toml", "a dog")):
        keys = {"evaluation_files": [tmp_path / name], "evaluation_ngram": 2}
        assert dropped_by(f"see {text} on a sofa in the rain", **keys) == "evaluation_files"
        assert dropped_by("see one on a wet sofa", **keys) is None


def test_a_malformed_evaluation_file_is_named(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "what?"}\n{"question": 3}\n')
    with pytest.raises(UserError, match=r"questions\.jsonl, row 2: needs a text under 'question'"):
        filtered("text", evaluation_files=[file])
    with pytest.raises(UserError, match=r"nothing\.jsonl: cannot read it"):
        filtered("text", evaluation_files=[tmp_path / "nothing.jsonl"])


def test_functions_that_fail_are_named(tmp_path):
    with pytest.raises(UserError, match=r"'shout' on broken failed \(ValueError: no idea\)"):
        filtered("text", name="broken", function="shout")
    with pytest.raises(UserError, match="on wrong returned NoneType, not a Document"):
        filtered("text", name="wrong", function="shout")
    with pytest.raises(UserError, match=r"registers 'other' .*; registered: gone, object, shout"):
        filtered("text", function="other")
    with pytest.raises(UserError, match=r"tests\.no_module:shout cannot be imported"):
        filtered("text", function="gone")


@pytest.mark.parametrize("name", ["no reason", "no text", "no name"])
def test_what_a_function_returns_is_checked(name):
    with pytest.raises(UserError, match=rf"'shout' on {name} returned (an empty|a Document)"):
        filtered("text", name=name, function="shout")


@pytest.mark.parametrize(
    "keys",
    [
        {"min_language_probability": 0.5},
        {"evaluation_ngram": 5},
        {"evaluation_overlap": 0.1},
        {"near_duplicate_ngram": 3},
        {"function": ""},
    ],
)
def test_keys_without_effect_are_refused(keys):
    with pytest.raises(ValidationError, match=r"has no effect without|at least 1 character"):
        CleaningConfig(**keys)
    config = CleaningConfig(languages=("en",))
    assert CleaningConfig.model_validate(config.model_dump()) == config


def test_a_filter_follows_changes_of_evaluation_files(tmp_path):
    file = tmp_path / "questions.jsonl"
    keys = {"evaluation_files": [file], "evaluation_ngram": 3}
    for question in ("one two three four", "five six seven eight"):
        file.write_text(json.dumps({"question": question}))
        assert dropped_by(question, **keys) == "evaluation_files"
        assert dropped_by("something else here entirely", **keys) is None


def test_words_keep_their_marks():
    assert ngrams("दाल दिल", 1) == ["दाल", "दिल"]
    assert ngrams("Cafe\u0301", 1) == ngrams("café", 1) == ["café"]


def test_unknown_languages_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"clean.languages: unknown xx; known: ace, af, "):
        filtered("text", languages=["en", "xx"])


def test_text_that_is_not_unicode_is_rejected_by_no_filter(tmp_path):
    file = questions(tmp_path)
    for keys in ({}, {"evaluation_files": [file]}, {"function": "shout"}):
        row = filtered("half a pair: \ud800", **keys)
        assert isinstance(row, Rejected) and not row.dropped_by


def test_the_fingerprint_changes_with_what_filters_do(tmp_path):
    file = questions(tmp_path)
    keys: list[dict[str, Any]] = [
        {},
        {"function": "shout"},
        {"languages": ["en"]},
        {"languages": ["en"], "min_language_probability": 0.5},
        {"evaluation_files": [file]},
        {"evaluation_files": [file], "evaluation_overlap": 0.1},
        {"min_image_side": 3},
    ]
    found = [filters_fingerprint(CleaningConfig(**each)) for each in keys]
    assert len({*found}) == len(keys) and found[0] == ""
    (tmp_path / "questions.jsonl").write_text('{"question": "another"}\n')
    assert filters_fingerprint(CleaningConfig(**keys[4])) != found[4]


def test_the_fingerprint_changes_with_the_version_of_a_package(monkeypatch):
    config = CleaningConfig(languages=("en",))
    before = filters_fingerprint(config)
    monkeypatch.setattr(filters, "version", lambda package: f"{package} 0")
    assert filters_fingerprint(config) != before


def test_a_function_that_cannot_be_imported_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be imported"):
        provide_cleaning([Listed(clean=CleaningConfig(function="gone"))], tmp_path)


def test_a_function_can_be_an_object_that_is_called():
    assert filters_fingerprint(CleaningConfig(function="object"))
    assert filtered("a", function="object").segments == ("A",)
