"""The process in which SVG images are drawn, one after another, within limits.

It runs this file as a script, which imports nothing of this package, so that it starts at once.
"""

import signal
import struct
import sys
from contextlib import suppress
from functools import partial
from typing import BinaryIO

# Length of the SVG image in bytes, side in pixels, seconds of processor time.
REQUEST = struct.Struct("<QId")
# Whether it was drawn, and the length of what follows: a PNG file, else the reason in UTF-8.
ANSWER = struct.Struct("<?Q")
_MAX_MEMORY = 2 * 2**30


def main(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more; where a limit is exceeded, the process ends."""
    # Signals to a whole job are for the process that asks; its end ends this one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # The process that asks may ignore it.
    _limit_memory()
    import resvg_py

    # Lengths in points are zero without `dpi`.
    draw = partial(resvg_py.svg_to_bytes, dpi=96, skip_system_fonts=True)
    while header := requests.read(REQUEST.size):
        length, side, seconds = REQUEST.unpack(header)
        svg = requests.read(length).decode()
        # It counts processor time: how busy the machine is decides nothing.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            is_drawn, content = True, bytes(draw(svg_string=svg, width=side, height=side))
        except BaseException as error:  # A panic of Rust is no Exception.
            is_drawn, content = False, str(error).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(ANSWER.pack(is_drawn, len(content)) + content)
        answers.flush()


def _limit_memory() -> None:
    import resource  # not on every system

    with suppress(ValueError):  # macOS does not limit memory.
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
