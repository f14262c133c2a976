"""Answers to a file of prompts, on one rank or many, resumable.

    prompts.jsonl → rank r of R answers the prompts r, r + R, …: images, lines of part-r.jsonl
                  → the last rank to end joins the parts: results.jsonl, in the order of the prompts

A prompt's images are on disk before its line, so that a prompt with a line is complete.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moma.data.documents import Document, Rejected, Segment
from moma.data.outputs import mark_output
from moma.data.sources.interleaved import InterleavedConfig
from moma.errors import UserError
from moma.files import (
    UNFINISHED,
    add_path_to_errors,
    atomic_open,
    atomic_write,
    fingerprint,
    lock_folder,
    read_json,
    sync_file,
)
from moma.generate.stream import Content
from moma.images import png_bytes
from moma.progress import show_progress

_MANIFEST, _RESULTS, _PART = "generate.json", "results.jsonl", "part-{}.jsonl"
_LOCK_SECONDS = 60.0

Numbered = tuple[int, list[Content]]
# Takes numbered prompts one by one, and yields numbered answers as they are complete.
Answer = Callable[[Iterator[Numbered]], Iterable[Numbered]]


def read_prompts(path: Path, check: Callable[[Sequence[Segment]], object]) -> list[Document]:
    """Read a file of prompts, in the layout of `interleaved` sources; images are not decoded yet.

    Args:
        check: raises `UserError` if a prompt cannot be answered.

    Raises:
        UserError: there are none, a row is malformed or not answerable, or an image is missing.
    """
    prompts: list[Document] = []
    for document in InterleavedConfig(path=path).documents():
        if isinstance(document, Rejected):
            raise UserError(document.message)
        for part in document.segments:
            if not isinstance(part, str) and (reason := part.missing()):
                raise UserError(reason)
        try:
            check(document.segments)
        except UserError as error:
            raise UserError(f"{document.row}: {error}") from error
        prompts.append(document)
    if not prompts:
        raise UserError(f"{path}: has no prompts; write one JSON object per line")
    return prompts


def answer_prompts(
    prompts: list[Document],
    out: Path,
    settings: Mapping[str, Any],
    answer: Answer,
    rank: int = 0,
    ranks: int = 1,
    quiet: bool = False,
) -> bool:
    """Answer this rank's prompts that have no answer yet.

    Args:
        prompts: from `read_prompts`.
        out: folder for `results.jsonl` and images; new, or that of the same prompts and settings.
        settings: everything that determines the answers, in JSON types.
        answer: continues prompts; a prompt's number, from 0, determines its seed.
        rank, ranks: index and number of the processes that share the prompts.

    Returns:
        Whether all prompts of all ranks are answered, and `results.jsonl` is complete.

    Raises:
        UserError: `out` holds something else, or a prompt cannot be answered.
    """
    names = "\n".join(prompt.name for prompt in prompts)
    _open_folder(out, {**settings, "prompts": fingerprint(names.encode())})
    own = range(rank, len(prompts), ranks)
    with lock_folder(out, _LOCK_SECONDS):  # another rank may be joining the parts
        done = _read_results(out)
    missing = [number for number in own if number not in done]
    part = out / _PART.format(rank)
    _cut_unfinished_line(part)
    with (
        show_progress("prompts", len(own), quiet) as report,
        add_path_to_errors(part),
        part.open("ab") as file,
    ):
        queued = ((number, _content(prompts[number])) for number in missing)
        for count, (number, content) in enumerate(answer(queued), 1):
            file.write(_save(number, content, out))
            sync_file(file)
            report(len(own) - len(missing) + count)
    return _join_parts(out, len(prompts))


def _open_folder(out: Path, settings: Mapping[str, Any]) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is not a folder; name another")
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out, _LOCK_SECONDS):
        manifest = out / _MANIFEST
        if not manifest.exists():
            if {path.name for path in out.iterdir()} - {_MANIFEST + UNFINISHED}:
                raise UserError(f"--out {out}: is not empty; name a new folder")
            atomic_write(manifest, json.dumps(settings, indent=2) + "\n")
        found = read_json(manifest)
        found = found if isinstance(found, dict) else {}
        if differing := [key for key in settings if found.get(key) != settings[key]]:
            raise UserError(
                f"--out {out}: holds answers with other {', '.join(differing)}; name a new folder, "
                "or repeat the command that began it"
            )
        mark_output(out, "*")


def _content(prompt: Document) -> list[Content]:
    return [part if isinstance(part, str) else part.read() for part in prompt.segments]


def _save(number: int, content: list[Content], out: Path) -> bytes:
    """Write the images of an answer and return its line of `results.jsonl`."""
    segments: list[dict[str, str]] = []
    for position, part in enumerate(content, 1):
        if isinstance(part, str):
            segments.append({"type": "text", "text": part})
            continue
        name = f"{number + 1:06}_{position}.png"
        with atomic_open(out / name) as file:
            file.write(png_bytes(part))
        segments.append({"type": "image", "image": name})
    line = {"prompt": number + 1, "segments": segments}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _read_results(out: Path) -> dict[int, bytes]:
    """Return the complete lines of all ranks, by the number of the prompt."""
    lines: dict[int, bytes] = {}
    for path in (out / _RESULTS, *out.glob(_PART.format("*"))):
        content = path.read_bytes() if path.exists() else b""
        for line in content[: content.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                lines[json.loads(line)["prompt"] - 1] = line
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: damaged; begin in a new folder") from error
    return lines


def _cut_unfinished_line(part: Path) -> None:
    """Cut off a line that was being written when the process was killed."""
    content = part.read_bytes() if part.exists() else b""
    with part.open("ab") as file:
        file.truncate(content.rfind(b"\n") + 1)


def _join_parts(out: Path, prompts: int) -> bool:
    with lock_folder(out, _LOCK_SECONDS):
        lines = _read_results(out)
        if len(lines) < prompts:
            return False
        with atomic_open(out / _RESULTS) as file:
            file.writelines(lines[number] for number in range(prompts))
        for part in out.glob(_PART.format("*")):
            part.unlink()
    return True
