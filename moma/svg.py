"""Drawing SVG images, which are not trusted.

    bytes → XML → without other files? → a process with limits → PNG → image

A few hundred bytes can ask for hours of drawing or for all memory, by references that double at
each level or by numbers of filters. The package that draws has no limits, so that it runs in a
process of its own, which is ended and started again where a drawing exceeds them.
"""

import importlib.util
import io
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, cast

from PIL import Image

from moma.errors import UserError
from moma.svg_process import ANSWER, REQUEST

MAX_BYTES = 16 * 2**20
# Of processor time. The slowest of 2,000 icons took 0.1 s.
_MAX_SECONDS = 10.0


def draw_svg(svg: bytes, side: int, what: str, drawer: "Drawer | None" = None) -> Image.Image:
    """Draw an SVG image within `side` × `side` pixels, with transparency.

    One that refers to other files is refused, since it may name any file of the machine.

    Args:
        what: its name, for messages.
        drawer: draws it; by default one of this process.

    Raises:
        UserError: it is too large, or the package that draws is missing.
        ValueError: it is not SVG, refers to other files, is nested too deeply, or drawing it takes
            more than 10 s of processor time or 2 GiB of memory.
    """
    if len(svg) > MAX_BYTES:
        raise UserError(f"{what} is too large: a drawing may have 16 MiB; simplify it")
    if not _can_draw():
        raise UserError(f"{what}: to draw SVG, run pip install 'moma[demo]'")
    from lxml import etree

    parser = etree.XMLParser(resolve_entities="internal", no_network=True, load_dtd=False)
    try:
        root = etree.fromstring(svg, parser)
    except etree.XMLSyntaxError as error:
        raise ValueError(f"not XML: {error}") from error
    links = [
        value
        for element in root.iter(etree.Element)
        for key, value in element.attrib.items()
        if etree.QName(element).localname in ("image", "feImage") and key.endswith("href")
    ]
    if not all(link.strip().startswith(("#", "data:")) for link in links):
        raise ValueError("it refers to other files")
    drawer = drawer or _drawer(os.getpid())
    return Image.open(io.BytesIO(drawer.draw(etree.tostring(root, encoding="utf-8"), side)))


@cache
def _can_draw() -> bool:
    return importlib.util.find_spec("resvg_py") is not None


class Drawer:
    """Draws in another process, one image at a time.

    Args:
        max_seconds: processor time of a drawing.
        python: the interpreter that runs the process.

    Attributes:
        process: the process that draws; None before it is needed.
    """

    def __init__(self, max_seconds: float = _MAX_SECONDS, python: str = sys.executable) -> None:
        self._lock, self._max_seconds, self._python = threading.Lock(), max_seconds, python
        self.process: subprocess.Popen[bytes] | None = None

    def draw(self, svg: bytes, side: int) -> bytes:
        """Return the PNG file of an SVG image.

        Raises:
            ValueError: it cannot be drawn, or not within the limits.
        """
        with self._lock:
            if self.process is None or self.process.poll() is not None:
                self.process = _start(self._python)
            process = self.process
            try:
                is_drawn, content = _ask(process, svg, side, self._max_seconds)
            except BaseException as error:
                # Also where a signal interrupts it: the next answer would be that of this request.
                self.process = None
                _end(process)
                if isinstance(error, EOFError | BrokenPipeError):
                    raise ValueError(self._reason(process.returncode)) from error
                raise
        if not is_drawn:
            raise ValueError(content.decode())
        return content

    def _reason(self, code: int) -> str:
        if code == -signal.SIGPROF:
            return f"drawing it takes more than {self._max_seconds:g} s of processor time"
        if code > 0:
            return "resvg-py, which draws it, does not start; install it again"
        return "drawing it fails: it is nested too deeply or takes more than 2 GiB of memory"


@cache
def _drawer(process_id: int) -> Drawer:
    """The drawer of this process: one that was forked shares no pipe with the one before."""
    return Drawer()


def _start(python: str) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("svg_process.py")
    return subprocess.Popen(
        [python, "-P", str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def _ask(
    process: subprocess.Popen[bytes], svg: bytes, side: int, max_seconds: float
) -> tuple[bool, bytes]:
    requests, answers = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
    requests.write(REQUEST.pack(len(svg), side, max_seconds) + svg)
    requests.flush()
    header = answers.read(ANSWER.size)
    if len(header) < ANSWER.size:
        raise EOFError
    is_drawn, length = ANSWER.unpack(header)
    content = answers.read(length)
    if len(content) < length:
        raise EOFError
    return is_drawn, content


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        # What is left to write cannot be.
        with suppress(BrokenPipeError):
            cast(IO[bytes], pipe).close()
