from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from moma.data.cleaning.config import CleaningConfig
from moma.data.documents import (
    Document,
    DroppedImageError,
    ImageRef,
    Rejected,
    SourceConfig,
    SourcePart,
)
from moma.data.encode.corpus import Corpus, ReadableImages, require_training_images
from moma.errors import UserError
from moma.images import read_image
from moma.tokenizers.image.codec import preprocess


def image(number, broken=False):
    def read():
        if broken:
            raise UserError(f"image {number} is broken")
        return Image.new("RGB", (8, 8), (number, 0, 0))

    return ImageRef(f"image {number}", read)


class Numbers(SourceConfig):
    """Documents with a text and an image each; every fifth row is rejected."""

    name: str = "numbers"
    count: int = 20

    def documents(self):
        for number in range(self.count):
            if number % 5 == 4:
                yield Rejected(f"numbers, row {number + 1}", "is divisible by five")
            else:
                segments = (f"text {number}", image(number))
                yield Document(str(number), segments, held_out=number % 2 == 0)


def test_held_out_documents_are_separate_and_rejected_rows_are_counted():
    corpus = Corpus([Numbers()], held_out=0.5, max_documents=100)
    assert list(corpus.texts()) == [f"text {n}" for n in range(1, 20, 2) if n % 5 != 4]
    assert corpus.documents == 8
    assert corpus.rejected_counts.total() == 4
    assert corpus.first_rejected == Rejected("numbers, row 5", "is divisible by five")
    names = [p.name for p in corpus.images(held_out=True)]
    assert names == [f"image {n}" for n in range(0, 20, 2) if n % 5 != 4]
    assert (corpus.rejected_counts.total(), corpus.totals) == (
        4,
        {"numbers": 20},
    )  # read twice, counted once


def test_text_that_is_not_unicode_is_rejected():
    class NotUnicode(Numbers):
        def documents(self):
            yield Document("a", ("half a pair: \ud800",), held_out=False, row="list, row 1")
            yield Document("b", ("text",), held_out=False)

    corpus = Corpus([NotUnicode()], held_out=0.5, max_documents=100)
    assert list(corpus.texts()) == ["text"]
    assert corpus.first_rejected is not None and corpus.first_rejected.row == "list, row 1"


def test_a_missing_image_is_rejected_before_any_is_read(tmp_path):
    (tmp_path / "there.png").touch()  # its content is not checked

    class Files(Numbers):
        def documents(self):
            for name in ("there", "gone"):
                read = partial(read_image, tmp_path / f"{name}.png", f"files, row {name}")
                found = ImageRef(name, read, tmp_path / f"{name}.png")
                yield Document(name, (found, name), held_out=False, row=f"files, row {name}")

    corpus = Corpus([Files()], held_out=0.5, max_documents=100, check_images=True)
    assert list(corpus.texts()) == ["there", "gone"]
    names = [image.name for image in corpus.images(held_out=False)]
    assert names == ["there", "gone"]  # the file may exist when they are read
    assert corpus.rejected_counts.total() == 1 and corpus.first_rejected is not None
    message = f"files, row gone: there is no {tmp_path}/gone.png; add the file or remove the row"
    assert corpus.first_rejected.message == message
    without = Corpus([Files()], held_out=0.5, max_documents=100)
    assert list(without.texts()) == ["there", "gone"] and not without.rejected_counts


def test_the_first_of_many_rejected_rows_are_kept(monkeypatch):
    monkeypatch.setattr("moma.data.encode.corpus.MAX_REJECTED_KEPT", 3)
    corpus = Corpus([Numbers()], held_out=0.5, max_documents=100)
    for _ in range(2):
        list(corpus.texts())
        assert corpus.rejected_counts.total() == 4
        assert [row.row for row in corpus.rejected["numbers"]] == [
            f"numbers, row {n}" for n in (5, 10, 15)
        ]


class Long(SourceConfig):
    """Texts in parts of ten, of which the last of each is rejected; counts how many are read."""

    name: str = "long"
    count: int = 1000
    streaming: bool = False

    def documents(self):
        for part in self.parts(0):
            yield from self.read_part(part)

    def parts(self, part_bytes):
        step = self.count if self.streaming else 10
        return [SourcePart(begin=n, end=n + step) for n in range(0, self.count, step)]

    def read_part(self, part):
        for number in range(part.begin, part.end):
            READ.append(number)
            if number % 10 == 9:
                yield Rejected(f"row {number}", "bad")
            else:
                yield Document(str(number), (f"{number}",))


READ: list[int] = []


def drawn(source, count, seed=0, held_out=0.0):
    READ.clear()
    return [int(text) for text in Corpus([source], held_out, count, seed=seed).texts()]


def test_every_source_gives_at_most_max_documents():
    corpus = Corpus([Numbers(), Numbers(name="others")], held_out=0.5, max_documents=3)
    found = [int(text.removeprefix("text ")) for text in corpus.texts()]
    assert len(found) == corpus.documents == 6
    assert found[:3] == sorted(found[:3]) and all(number % 2 for number in found)


def test_documents_are_drawn_of_all_parts_and_by_the_seed():
    found = drawn(Long(), 96)
    assert len({*found}) == 96 == len(found)
    assert len({number // 10 for number in found}) == 64  # parts of 100
    quarters = np.bincount(np.array(found) // 250)
    assert quarters.min() > 12
    assert found == drawn(Long(), 96) != drawn(Long(), 96, seed=1)
    assert {*drawn(Long(), 800)} < {*range(1000)}  # more parts follow the first 64
    assert len(drawn(Long(), 800)) == 800


def test_documents_are_drawn_of_all_of_a_part():
    source = Long(count=600).model_copy(update={"streaming": False})
    object.__setattr__(source, "parts", lambda part_bytes: [SourcePart(begin=0, end=600)])
    found = drawn(source, 100)
    assert len(found) == 100 and found == sorted(found)
    assert 250 < np.mean(found) < 350


def test_a_source_with_fewer_documents_is_used_in_its_order():
    assert drawn(Long(count=200), 1000) == [n for n in range(200) if n % 10 != 9]


def test_few_documents_of_a_large_source_are_read():
    drawn(Long(count=10**6), 8)
    assert len(READ) <= 2 * 8 * 8


def test_of_a_stream_the_first_documents_are_used():
    assert drawn(Long(streaming=True), 9) == [*range(9)]
    assert [*range(9)] == READ


def test_an_image_that_is_dropped_is_replaced():
    def small():
        raise DroppedImageError("image 0", "too small", "min_image_side")

    images = ReadableImages([ImageRef("image 0", small), image(1)], size=4, max_unreadable=0)
    assert torch.equal(images[0], images[1]) and not images.unreadable
    with pytest.raises(UserError, match="all 1 images are dropped by 'clean'"):
        ReadableImages([ImageRef("image 0", small)], size=4)[0]


def test_a_corpus_is_cleaned():
    source = Numbers(clean=CleaningConfig(min_image_side=9))
    (dropped, *_) = Corpus([source], held_out=0.5, max_documents=100).images(held_out=False)
    with pytest.raises(DroppedImageError):
        dropped.read()


def test_a_source_may_have_its_own_held_out_share():
    class Plain(Numbers):
        def documents(self):
            yield from (Document(str(n), (f"text {n}",)) for n in range(200))

    default, all_, most = (
        len(list(Corpus([source], held_out=0.5, max_documents=1000).texts()))
        for source in (Plain(), Plain(held_out=0.0), Plain(held_out=0.9))
    )
    assert 70 < default < 130
    assert all_ == 200
    assert most < 50


def test_images_are_read_as_inputs_of_the_codec():
    images = ReadableImages([image(n) for n in range(3)], size=4)
    assert len(images) == 3
    assert torch.equal(images[2], preprocess(Image.new("RGB", (8, 8), (2, 0, 0)), 4))
    assert len(list(images)) == 3
    with pytest.raises(IndexError):
        images[3]


def test_an_unreadable_image_is_replaced_by_the_next():
    broken = {7, 8, 199}
    images = ReadableImages([image(n, n in broken) for n in range(300)], size=4)
    of_index = partial(torch.equal, images[9])
    assert of_index(images[7]) and of_index(images[8])
    assert torch.equal(images[199], images[200])
    assert images.unreadable == {n: f"image {n} is broken" for n in broken}


def test_a_long_run_of_unreadable_images_is_read_once():
    reads = []

    def counted(number):
        def read():
            reads.append(number)
            raise UserError("x" * 5000)

        return ImageRef("", read)

    images = ReadableImages([*map(counted, range(200)), image(1)], size=4, max_unreadable=1)
    assert all(torch.equal(images[n], images[200]) for n in range(200))
    assert sorted(reads) == list(range(200))
    assert max(map(len, images.unreadable.values())) <= 600


def test_unreadable_images_are_an_error_each_time():
    images = ReadableImages([image(n, True) for n in range(3)], size=4, max_unreadable=1)
    for _ in range(2):
        with pytest.raises(UserError, match="3 of 3 images cannot be read"):
            images[2]


def test_more_than_a_hundredth_of_unreadable_images_is_an_error():
    images = ReadableImages([image(n, n in (3, 4)) for n in range(100)], size=4)
    with pytest.raises(UserError, match=r"2 of 100 images .*image 4 is broken"):
        images[3]


def test_only_unreadable_images_are_an_error_at_any_limit():
    images = ReadableImages([image(n, True) for n in range(3)], size=4, max_unreadable=1)
    with pytest.raises(UserError, match="3 of 3 images cannot be read"):
        images[1]


class Stored(Numbers):
    """Images that hold their bytes, as those of a stream do."""

    def documents(self):
        for number in range(self.count):
            data = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
            read = partial(Image.fromarray, data)
            yield Document(str(number), (ImageRef(f"image {number}", read),), held_out=False)


def test_images_that_hold_their_bytes_are_stored_on_disk():
    source = Stored()
    images = Corpus([source], held_out=0.5, max_documents=100).images(held_out=False)
    stored = [document.segments[0] for document in source.documents()]
    assert [one.name for one in images] == [one.name for one in stored]
    for one, expected in reversed(list(zip(images, stored, strict=True))):
        assert one.read().tobytes() == expected.read().tobytes()
        held = sum(len(a.tobytes()) for a in one.read.args if isinstance(a, np.ndarray))
        assert held == 0


def test_a_full_temporary_disk_is_reported(monkeypatch):
    def full(*arguments, **options):
        return open("/dev/full", "w+b")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match=r"No space left.*set TMPDIR"):
        Corpus([Stored()], held_out=0.5, max_documents=100).images(held_out=False)


def test_has_readable_raises_no_error():
    def images(*broken):
        return ReadableImages([image(n, b) for n, b in enumerate(broken)], 4, max_unreadable=1)

    assert images(True, False).has_readable
    assert not images(True, True).has_readable
    assert not images().has_readable


def test_too_many_rejected_documents_are_an_error():
    list(Corpus([Numbers()], 0.5, 100, max_rejected=0.2).texts())
    corpus = Corpus(
        [Numbers()], 0.5, 100, 0.19, list_rejected=lambda name, rows: f"a list of {name}"
    )
    found = (
        r"'numbers': 4 of 20 documents .* 0\.19 .* row 5: is divisible by five "
        r"\(a list of numbers lists all\)"
    )
    with pytest.raises(UserError, match=found):
        list(corpus.texts())


def test_reading_stops_when_too_many_documents_are_rejected():
    read = []

    class Endless(Numbers):
        def documents(self):
            for number in range(10**9):
                read.append(number)
                yield Rejected(f"row {number}", "bad")

    with pytest.raises(UserError, match="1024 of 1024 documents were rejected"):
        list(Corpus([Endless()], 0.5, 200, max_rejected=0.5).texts())
    assert len(read) == 1024 + 8 * 200  # they are counted before


def test_a_corpus_without_training_data_is_refused_with_the_reason():
    class Broken(Numbers):
        def documents(self):
            yield Rejected("broken, row 1", "not UTF-8")

    class HeldOut(Numbers):
        def documents(self):
            yield Document("a", ("text", image(0)), held_out=True)

    for source, reason in (
        (Broken(), "no document to train on; the first: broken, row 1: not"),
        (HeldOut(), r"all 1 documents are held out.*lower data\.held_out"),
    ):
        corpus = Corpus([source], held_out=0.5, max_documents=100)
        list(corpus.texts())
        with pytest.raises(UserError, match=reason):
            corpus.require_documents()
    with pytest.raises(UserError, match="all 1 images are in held-out documents"):
        require_training_images([], [image(0)], "")
    with pytest.raises(UserError, match=r"the sources have no images.*; add one"):
        require_training_images([], [], "add one")
