"""Drawings that take too long or too much memory are refused, and the next ones are drawn."""

import os
import signal
import struct
import zlib
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from subprocess import Popen

import pytest

from moma.svg import Drawer, draw_svg

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">{}</svg>'
RED = '<rect width="64" height="64" fill="red"/>'
FILTER = '<filter id="f">{}</filter><rect width="64" height="64" filter="url(#f)"/>'
OCTAVES = FILTER.format('<feTurbulence baseFrequency="0.1" numOctaves="99"/>')
LEVELS = "".join(
    f'<g id="g{n}"><use href="#g{n - 1}"/><use href="#g{n - 1}"/></g>' for n in range(1, 14)
)
USES = f'<defs><rect id="g0" width="9" height="9"/>{LEVELS}</defs><use href="#g13"/>'
# Its header alone asks for 3.6 GB.
HEADER = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 6, 0, 0, 0)
PIXELS = b"IDAT" + zlib.compress(bytes(10**6))
PNG = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    for chunk in (HEADER, PIXELS, b"IEND")
)
LARGE = f'<image width="64" height="64" href="data:image/png;base64,{b64encode(PNG).decode()}"/>'
DEEP = '<g opacity="0.5">' * 250 + RED + "</g>" * 250


@pytest.fixture(scope="module")
def drawer():
    return Drawer()


def draw(body, drawer, side=8):
    return draw_svg(SVG.format(body).encode(), side, "a.svg", drawer)


def is_red(image):
    return image.convert("RGB").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("body", [OCTAVES, USES], ids=["octaves", "uses"])
def test_a_drawing_that_takes_too_long_is_refused(body):
    """Both take seconds of processor time where nothing ends them."""
    drawer = Drawer(max_seconds=0.1)
    with pytest.raises(ValueError, match=r"takes more than 0.1 s of processor time"):
        draw(body, drawer, side=512)
    assert is_red(draw(RED, drawer))


def test_the_time_of_a_drawing_is_its_own():
    drawer = Drawer(max_seconds=0.1)
    processes: set[Popen[bytes] | None] = set()
    for _ in range(100):
        assert is_red(draw(RED, drawer, side=256))
        processes.add(drawer.process)
    assert len(processes) == 1


@pytest.mark.parametrize("body", [DEEP, LARGE], ids=["deep", "large"])
def test_a_drawing_that_would_end_the_program_is_refused(drawer, body):
    with pytest.raises(ValueError, match="nested too deeply or takes more than 2 GiB of memory"):
        draw(body, drawer, side=512)
    assert is_red(draw(RED, drawer))


def test_an_interrupted_drawing_is_not_the_answer_to_the_next_request(drawer):
    def interrupt(*_):
        raise KeyboardInterrupt

    draw(RED, drawer)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            draw(OCTAVES, drawer, side=512)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert is_red(draw(RED, drawer))


def test_threads_each_get_their_own_drawing(drawer):
    colors = [f"#0000{n:02x}" for n in range(64)]

    def matches(color):
        image = draw(RED.replace("red", color), drawer)
        return image.convert("RGB").getpixel((4, 4)) == (0, 0, int(color[5:], 16))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(matches, colors))


def test_a_process_that_was_ended_between_two_drawings_is_started_again(drawer):
    draw(RED, drawer)
    process = drawer.process
    assert process is not None
    process.send_signal(signal.SIGTERM)  # as to every process of a job that is to stop
    draw(RED, drawer)
    assert drawer.process is process
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_red(draw(RED, drawer))


def test_a_package_that_does_not_start_is_no_fault_of_the_drawing():
    with pytest.raises(ValueError, match=r"resvg-py, which draws it, does not start"):
        draw(RED, Drawer(python="false"))
