"""Duplicates, against a comparison of every document with all that were kept before it."""

import random
from functools import partial
from typing import Any

import imagehash
import numpy as np
import pytest
from PIL import Image

from moma.data.cleaning import comparisons, filters
from moma.data.cleaning.clean import Cleaning
from moma.data.cleaning.config import CleaningConfig
from moma.data.cleaning.duplicates import (
    Comparison,
    Duplicate,
    ImageTable,
    find_duplicates,
    image_bands,
    rows_of_band,
)
from moma.data.cleaning.ngrams import ngrams
from moma.data.cleaning.passes import provide_cleaning
from moma.data.documents import Document, DroppedImageError, ImageRef, Rejected, SourceConfig
from moma.errors import UserError


class Listed(SourceConfig):
    """Documents of given texts and images, as `documents_of` makes them."""

    kind: str = "listed"
    rows: tuple[tuple[str | int, ...], ...] = ()

    def documents(self):
        yield Rejected("row 0", "is no document")
        for number, segments in enumerate(self.rows):
            parts = [part if isinstance(part, str) else image(part) for part in segments]
            yield Document(f"{self.name} {number}", tuple(parts), row=f"row {number}")


def image(seed):
    """A smooth random image; those of seeds 100 apart differ in a few pixels only."""

    def read():
        if seed < 0:
            raise UserError("damaged")
        draw = np.random.default_rng(seed % 100)
        small = Image.fromarray(draw.integers(0, 256, (4, 4, 3), np.uint8))
        pixels = np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC)).copy()
        pixels[: seed // 100, 0] ^= 1
        return Image.fromarray(pixels)

    return ImageRef(f"image {seed}", read)


def listed(name, *rows, **clean):
    documents = tuple((row,) if isinstance(row, str) else row for row in rows)
    return Listed(name=name, rows=documents, clean=CleaningConfig(**clean))


def cleaned(folder, *sources):
    """What is left of each source: a list of segments, images by name, or the key that drops it."""
    found = {}
    for name, cleaning in provide_cleaning(sources, folder).items():
        (source,) = (each for each in sources if each.name == name)
        rows = [*cleaning.rows(source.documents())][1:]
        found[name] = [row.dropped_by if isinstance(row, Rejected) else left(row) for row in rows]
    return found


def left(document):
    parts = []
    for part in document.segments:
        if isinstance(part, str):
            parts.append(part)
            continue
        try:
            part.read()
            parts.append(part.name)
        except DroppedImageError as error:
            parts.append(error.rejected.dropped_by)
    return parts


def random_texts(count, seed=0):
    """Texts of 60 words; half of them are new ones with one word, or half of them, changed."""
    draw = random.Random(seed)
    texts: list[str] = []
    new: list[str] = []
    for _ in range(count):
        words = [f"w{draw.randrange(500)}" for _ in range(60)]
        if new and draw.random() < 0.5:
            words = draw.choice(new).split()
            for place in draw.sample(range(60), draw.choice([1, 30])):
                words[place] = f"w{draw.randrange(500)}"
        else:
            new.append(" ".join(words))
        texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("words", [1, 3])
def test_near_duplicates_are_those_of_exact_similarities(tmp_path, words):
    texts, threshold = random_texts(120), 0.7
    kept: list[set[str]] = []
    expected = []
    for text in texts:
        own = {*ngrams(text, words)}
        similarities = [len(own & other) / len(own | other) for other in kept]
        # No pair is so near to the threshold that the estimate could decide otherwise.
        assert not [s for s in similarities if abs(s - threshold) < 0.1]
        is_duplicate = any(similarity >= threshold for similarity in similarities)
        expected.append("near_duplicate_texts" if is_duplicate else [text])
        if not is_duplicate:
            kept.append(own)
    keys = {"near_duplicate_texts": threshold, "near_duplicate_ngram": words}
    assert cleaned(tmp_path, listed("a", *texts, **keys)) == {"a": expected}
    assert 20 < expected.count("near_duplicate_texts") < 60


def test_near_duplicates_of_images_are_those_of_all_pairs(tmp_path):
    seeds = [*range(30), 103, 307, 2905, 1203]
    hashes = [imagehash.phash(image(seed).read()) for seed in seeds]
    for distance in (0, 1, 4):
        expected: list[list[str]] = []
        kept: list[Any] = []
        for seed, own in zip(seeds, hashes, strict=True):
            if any(own - other <= distance for other in kept):
                expected.append(["text", "near_duplicate_images", "text"])
            else:
                kept.append(own)
                expected.append(["text", f"image {seed}", "text"])
        rows = [("text", seed, "text") for seed in seeds]
        source = listed("a", *rows, near_duplicate_images=distance)
        assert cleaned(tmp_path / str(distance), source) == {"a": expected}
    assert any("near_duplicate_images" in row for row in expected)


def test_bands_of_images_share_one_within_the_distance():
    draw = np.random.default_rng(0)
    for distance in (0, 3, 16):
        one = draw.integers(0, 2**64, 1, np.uint64)
        for _ in range(50):
            bits = draw.choice(64, distance, replace=False).astype(np.uint64)
            other = one ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
            pairs = image_bands(np.concatenate([one, other]), distance)
            assert any(band[0] == band[1] for band in pairs)


def test_a_pair_of_the_threshold_is_found_with_99_percent():
    for threshold in (0.5, 0.8, 0.95):
        rows = rows_of_band(threshold)
        assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.99
        assert 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.99


def test_the_first_source_keeps_a_document(tmp_path):
    first = listed("first", "one", "two", "one", duplicate_texts=True)
    second = listed("second", "three", " two\n", "one", duplicate_texts=True)
    other = listed("other", "one", "one")  # its key is off
    dropped = "duplicate_texts"
    expected = {"first": [["one"], ["two"], dropped], "second": [["three"], dropped, dropped]}
    assert cleaned(tmp_path, first, second, other) == expected | {"other": [["one"]] * 2}
    expected = {"first": [dropped] * 3, "second": [["three"], [" two\n"], ["one"]]}
    assert cleaned(tmp_path, second, first) == expected


def test_the_reason_names_the_document_that_is_kept(tmp_path):
    source = listed("a", "one", "two", "one", duplicate_texts=True)
    rows = provide_cleaning([source], tmp_path)["a"].rows(source.documents())
    dropped = [row for row in rows if isinstance(row, Rejected) and row.dropped_by]
    assert [row.row for row in dropped] == ["row 2"]
    assert dropped[0].reason == "clean.duplicate_texts: the same content as document 2 of a has"


def test_a_document_that_is_rejected_has_no_duplicates(tmp_path):
    """Otherwise both were lost; its image cannot be read."""
    source = listed("a", ("one", -1), ("one", 1), ("one", 2), duplicate_texts=True)
    rows = [*provide_cleaning([source], tmp_path)["a"].rows(source.documents())][2:]
    assert [isinstance(row, Rejected) for row in rows] == [False, True]


def test_each_source_has_its_own_threshold(tmp_path):
    texts = ["a b c d e f g h", "a b c d e f g h i j k l", "a b c d e f g h x"]  # 0.67, 0.89
    for own, expected in ((0.95, 0), (0.8, 1), (0.6, 2)):
        first = listed("first", texts[0], near_duplicate_texts=1, near_duplicate_ngram=1)
        keys = {"near_duplicate_texts": own, "near_duplicate_ngram": 1}
        found = cleaned(tmp_path / str(own), first, listed("second", *texts[1:], **keys))
        assert found["second"].count("near_duplicate_texts") == expected


def test_a_dropped_document_drops_no_other(tmp_path):
    """Neither its text nor its images count as seen."""
    keys = {"duplicate_texts": True, "duplicate_images": True}
    rows = [("same", 1, "end"), ("same", 2, "end"), ("other", 2, "end"), ("other", 1, "end")]
    found = cleaned(tmp_path, listed("a", *rows, **keys))
    assert found["a"] == [
        ["same", "image 1", "end"],
        "duplicate_texts",
        ["other", "image 2", "end"],
        "duplicate_texts",
    ]


def test_a_dropped_image_drops_no_other():
    """Three images, each of them near the one before it only."""
    documents, key = np.arange(3), "near_duplicate_images"
    bands = iter([np.zeros(3, np.uint64)])
    near = Comparison(key, documents, documents, bands, lambda item, others: others >= item - 1)
    images = ImageTable(documents, np.zeros(3, np.int32), np.zeros(3, bool))
    assert [*find_duplicates([near], images)] == [Duplicate(1, 0, key, 0)]


def test_an_image_is_dropped_of_a_later_document_only(tmp_path):
    source = listed("a", ("x", 1, 1, "y"), ("z", 2, 1, "z"), ("u", 2, "u"), duplicate_images=True)
    expected = [
        ["x", "image 1", "image 1", "y"],
        ["z", "image 2", "duplicate_images", "z"],
        ["u", "duplicate_images", "u"],
    ]
    assert cleaned(tmp_path, source) == {"a": expected}


def test_a_caption_is_dropped_with_its_image(tmp_path):
    source = listed("a", ("one", 1), ("two", 1), (1, 1), duplicate_images=True)
    assert cleaned(tmp_path, source)["a"] == [["one", "image 1"], *["duplicate_images"] * 2]


def test_thresholds_do_not_read_the_source_again(tmp_path, monkeypatch):
    near = {"near_duplicate_ngram": 1}
    source = listed("a", *random_texts(20), near_duplicate_texts=0.6, **near)
    few = cleaned(tmp_path, source)
    monkeypatch.setattr(Listed, "documents", lambda self: iter(()))
    strict = listed("a", *random_texts(20), near_duplicate_texts=1, **near)
    strict = strict.model_copy(update={"rows": source.rows})
    cleaning = provide_cleaning([strict], tmp_path)["a"]
    loose = provide_cleaning([source], tmp_path)["a"]
    assert isinstance(cleaning, Cleaning) and cleaning.fingerprint != loose.fingerprint
    monkeypatch.undo()
    assert cleaned(tmp_path, source) == few


@pytest.mark.parametrize("key", ["near_duplicate_texts", "near_duplicate_images"])
def test_another_version_of_a_package_makes_signatures_again(tmp_path, monkeypatch, key):
    source = listed("a", ("one", 1, "end"), ("two", 1, "end"), **{key: 1})
    found = cleaned(tmp_path, source)
    before = [*tmp_path.glob("signatures/a/*")]
    assert cleaned(tmp_path, source) == found and [*tmp_path.glob("signatures/a/*")] == before
    monkeypatch.setattr(filters, "version", lambda package: f"{package} 0")
    assert cleaned(tmp_path, source) == found
    (after,) = tmp_path.glob("signatures/a/*")
    assert [after] != before


def test_many_texts_of_the_same_boilerplate_are_compared_with_a_few(tmp_path, monkeypatch):
    """All share bands; a near duplicate shares more of them, so that it is found nevertheless."""
    draw = random.Random(0)
    same = " ".join(f"s{draw.randrange(5000)}" for _ in range(300))
    own = [[f"w{draw.randrange(5000)}" for _ in range(50)] for _ in range(60)]
    texts = [f"{same} {' '.join(words)}" for words in own]
    texts += [f"{text} and more" for text in texts[::3]]
    source = listed("a", *texts, near_duplicate_texts=0.9, near_duplicate_ngram=1)
    pairs: list[int] = []
    limits: dict[str, int] = {}
    make = comparisons.Comparison.__new__

    def counting(cls, *values):
        made = make(cls, *values)

        def count(item, others):
            pairs.append(len(others))
            return made.matches(item, others)

        return made._replace(matches=count, **limits)

    monkeypatch.setattr(comparisons, "Comparison", partial(counting, comparisons.Comparison))
    everything = cleaned(tmp_path / "all", source)
    assert everything["a"] == [[text] for text in texts[:60]] + ["near_duplicate_texts"] * 20
    compared = sum(pairs)
    pairs.clear()
    limits["max_compared"] = 2
    assert cleaned(tmp_path / "few", source) == everything
    assert sum(pairs) < compared / 2


def test_texts_of_scripts_without_spaces_have_ngrams_of_characters():
    assert ngrams("红苹果 ok", 2) == ["红 苹", "苹 果", "果 ok"]
    assert ngrams("Äb_1 red", 1) == ["äb_1", "red"] and ngrams("Ab_1 red", 1) == ["ab_1", "red"]
    assert ngrams("A red, RED apple!", 3) == ["a red red", "red red apple"]
    assert ngrams("short", 3) == ["short"] and ngrams("?!", 3) == []
