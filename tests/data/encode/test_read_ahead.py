"""Reading images ahead: order, back-pressure, errors, and workers that end."""

import multiprocessing
import os
import subprocess
import sys
import time
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

shape = partial(square_pixels, size=2)


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


def is_alive(process):
    return (
        os.path.exists(f"/proc/{process}")
        and "Z" not in open(f"/proc/{process}/stat").read().split(")")[1].split()[0]
    )


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
import multiprocessing, time
from functools import partial
from PIL import Image
from moma.data.documents import ImageRef
from moma.data.encode.read_ahead import ImageReader
from moma.images import square_pixels
with ImageReader(partial(square_pixels, size=2), 2, seconds=0) as reader:
    images = [ImageRef("", partial(Image.new, "RGB", (2, 2))) for _ in range(40)]
    list(reader.read(images))
    print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
    time.sleep(60)
"""
    paths = os.pathsep.join(path for path in sys.path if path)
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert parent.stdout is not None
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(is_alive(worker) for worker in workers)
    parent.kill()
    parent.communicate()
    for _ in range(100):
        if not any(is_alive(worker) for worker in workers):
            return
        time.sleep(0.1)
    pytest.fail("a worker outlived its process")


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
