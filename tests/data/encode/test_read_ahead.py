"""Reading images ahead: order, back-pressure, errors, and workers that end."""

import multiprocessing
import os
from functools import partial

import pytest
from PIL import Image

from moma.data.documents import ImageRef
from moma.data.encode import read_ahead
from moma.data.encode.corpus import ReadableImages
from moma.data.encode.read_ahead import ImageReader, Pixels
from moma.demo.drawings import render
from moma.errors import StorageError, UserError
from moma.images import square_pixels
from tests.data.encode.failing_disk import fail_to_read
from tests.processes import forked
from tests.runtime.killed_parent import assert_workers_end_with_parent

shape = partial(square_pixels, size=2)


@pytest.fixture(autouse=True)
def _fork_workers():
    with forked():
        yield


def image(number):
    return ImageRef(str(number), partial(Image.new, "RGB", (2, 2), (number, 0, 0)))


def outcome(item):
    if isinstance(item, Pixels):
        return int(item.values[0, 0, 0])
    return str(item)


REASON = "'no such object': no drawing of that name in both styles"
ITEMS = [
    "start",
    *[image(n) for n in range(9)],
    "middle",
    "again",
    ImageRef("bad", partial(render, "no such object", "flat", 4)),  # raises `UserError`
    *[image(n) for n in range(9, 30)],
    "end",
]
EXPECTED = ["start", *range(9), "middle", "again", REASON, *range(9, 30), "end"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_items_keep_their_order(workers):
    with ImageReader(shape, workers, seconds=0) as reader:
        assert [outcome(item) for item in reader.read(ITEMS)] == EXPECTED
        # The same workers serve the next source.
        assert [outcome(item) for item in reader.read(ITEMS)] == EXPECTED


@pytest.mark.parametrize("workers", [0, 2])
def test_equal_images_have_equal_fingerprints(workers):
    with ImageReader(shape, workers, seconds=0) as reader:
        one, same, other = reader.read([image(1), image(1), image(2)])
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_images_that_cannot_be_pickled_are_read_in_this_process():
    local = ImageRef("local", lambda: Image.new("RGB", (2, 2), (5, 0, 0)))
    with ImageReader(shape, 1, seconds=0) as reader:
        assert [outcome(item) for item in reader.read([image(1), local])] == [1, 5]


def test_small_sources_start_no_worker(monkeypatch):
    monkeypatch.setattr(read_ahead, "ProcessPoolExecutor", None)
    with ImageReader(shape, 2) as reader:
        assert len(list(reader.read(ITEMS))) == len(ITEMS)


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_ahead_is_bounded(workers):
    drawn = []

    def items():
        for number in range(2000):
            drawn.append(number)
            yield image(number % 200)

    with ImageReader(shape, workers, seconds=0) as reader:
        for taken, _ in enumerate(reader.read(items()), 1):
            limit = read_ahead.TASK_IMAGES * (read_ahead.TASKS_PER_WORKER * workers + 2)
            assert len(drawn) - taken <= limit
            if taken == 100:
                break


def test_a_killed_worker_gives_an_error_with_the_remedy():
    def items():
        yield from [image(n) for n in range(50)]
        for worker in multiprocessing.active_children():
            worker.kill()
        yield from [image(n) for n in range(50)]

    with (
        pytest.raises(UserError, match=r"reads documents died.*--processes 1"),
        ImageReader(shape, 1, seconds=0) as reader,
    ):
        list(reader.read(items()))


def test_workers_end_with_the_reader():
    with ImageReader(shape, 2, seconds=0) as reader:
        next(reader.read(ITEMS[1:]))
        processes = multiprocessing.active_children()
    assert len(processes) == 2
    assert not any(process.is_alive() for process in processes)


@pytest.mark.skipif(not os.path.exists("/proc"), reason="looks processes up")
def test_workers_end_when_their_process_is_killed():
    code = """
from functools import partial
from PIL import Image
from moma.data.documents import ImageRef
from moma.data.encode.read_ahead import ImageReader
from moma.images import square_pixels
reader = ImageReader(partial(square_pixels, size=2), 2, seconds=0)
images = [ImageRef("", partial(Image.new, "RGB", (2, 2))) for _ in range(40)]
list(reader.read(images))
"""
    assert_workers_end_with_parent(code, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_disk_is_not_an_unreadable_image(workers):
    broken = ImageRef("", fail_to_read)
    with (
        ImageReader(shape, workers, seconds=0) as reader,
        pytest.raises(StorageError, match="the disk fails"),
    ):
        list(reader.read([broken]))
    with pytest.raises(StorageError, match="the disk fails"):
        ReadableImages([broken], size=2, max_unreadable=1)[0]
