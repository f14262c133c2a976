"""The pass over the sources whose documents are compared, before any is encoded.

    cleaning/signatures/SOURCE/FINGERPRINT/part-00000/   kept for other thresholds
    cleaning/duplicates/SOURCE.npy                       what is dropped, made from these

A change of a key makes only those signatures, and encodes only those sources, that it affects.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moma.data.cleaning.clean import DROPPED, Cleaning
from moma.data.cleaning.comparisons import PartSignatures, make_comparisons
from moma.data.cleaning.config import COMPARED_KEYS, CleaningConfig
from moma.data.cleaning.duplicates import find_duplicates
from moma.data.cleaning.filters import filters_fingerprint, package_version
from moma.data.cleaning.signatures import Signatures, open_signatures, write_signatures
from moma.data.documents import (
    SourceConfig,
    SourcePart,
    source_fingerprint,
)
from moma.data.encode.executors import MIN_POOL_BYTES, spare_cores
from moma.data.encode.parts import PLAN_FILE, Plan
from moma.data.shards import read_config
from moma.data.sources.parts import PART_BYTES
from moma.files import atomic_replace, atomic_write
from moma.progress import show_progress
from moma.runtime.processes import explain_lost_worker, start_pool

_DUPLICATES = "duplicates"
_ORIGIN_FILE = "origin.txt"


class _Task(NamedTuple):
    """The signatures of a part: its source and number, and where they are written."""

    source: SourceConfig
    part: SourcePart
    config: CleaningConfig
    folder: Path


class _Pass(NamedTuple):
    """The signatures of a source, part by part, and a fingerprint of what they were made from."""

    name: str
    config: CleaningConfig
    fingerprint: str
    parts: list[Signatures]

    @property
    def starts(self) -> list[int]:
        """Number of documents before each part, and in the end their total."""
        return [0, *np.cumsum([part.documents for part in self.parts]).tolist()]


def provide_cleaning(
    sources: Sequence[SourceConfig],
    folder: Path,
    part_bytes: int = PART_BYTES,
    quiet: bool = True,
    processes: int | None = 1,
) -> dict[str, Cleaning]:
    """Return how each source is cleaned, after a pass over those that are compared.

    Args:
        folder: where signatures and duplicates are kept.
        part_bytes: approximate size of the parts of the sources.
        processes: maximum processes that read parts; None for one on each core, if that pays.

    Raises:
        UserError: a filter cannot be used, or a source cannot be read.
    """
    configs = {source.name: source.clean for source in sources}
    filters = {name: filters_fingerprint(config) for name, config in configs.items()}
    found = {name: Cleaning(config, filters[name]) for name, config in configs.items()}
    plans = {
        source.name: _plan(source, part_bytes, configs[source.name], filters[source.name], folder)
        for source in sources
        if configs[source.name].compares_texts or configs[source.name].compares_images
    }
    if not plans:
        return found
    _compute([task for plan in plans.values() for task in plan], processes, quiet)
    passes = [_open(configs[name], plan) for name, plan in plans.items()]
    results = folder / _DUPLICATES
    _write_duplicates(passes, results)
    names = tuple(each.name for each in passes)
    for each in passes:
        file = results / f"{each.name}.npy"
        fingerprint = f"{filters[each.name]} {_fingerprint(np.load(file), names)}"
        starts = tuple(each.starts[:-1])
        found[each.name] = Cleaning(each.config, fingerprint, file, names, starts)
    return found


def _plan(
    source: SourceConfig, part_bytes: int, config: CleaningConfig, filters: str, folder: Path
) -> list[_Task]:
    """Return where the signatures of each part of a source belong."""
    near = config.near_duplicate_ngram if config.near_duplicate_texts else None
    perceptual = config.near_duplicate_images is not None
    needed = near, config.compares_texts, config.compares_images, perceptual
    packages = [
        package_version(key, package)
        for key, package, is_needed in (
            ("near_duplicate_texts", "rensa", near is not None),
            ("near_duplicate_images", "ImageHash", perceptual),
        )
        if is_needed
    ]
    made_from = source_fingerprint(source, 0), str(part_bytes), filters, repr(needed), *packages
    fingerprint = hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:16]
    own = folder / "signatures" / source.name / fingerprint
    plan = read_config(Plan, own / PLAN_FILE)
    if plan is None:  # to cut a source may take long: large files are read
        plan = Plan(part_bytes=part_bytes, parts=tuple(source.parts(part_bytes)))
        own.mkdir(parents=True, exist_ok=True)
        atomic_write(own / PLAN_FILE, plan.model_dump_json() + "\n")
    return [
        _Task(source, part, config, own / f"part-{number:05}")
        for number, part in enumerate(plan.parts)
    ]


def _compute(tasks: Sequence[_Task], processes: int | None, quiet: bool) -> None:
    """Compute the signatures that do not exist yet."""
    tasks = [task for task in tasks if open_signatures(task.folder) is None]
    if processes is None:
        is_small = sum(task.part.size for task in tasks) < MIN_POOL_BYTES
        processes = 1 if is_small else spare_cores() + 1
    done = 0
    with show_progress("compare", None, quiet) as report:
        if processes == 1 or len(tasks) < 2:
            for task in tasks:
                done = _write(task, report, done)
            return
        pool = start_pool(min(processes, len(tasks)))
        try:
            with explain_lost_worker("reads documents"):
                for running in as_completed([pool.submit(_write, task) for task in tasks]):
                    done += running.result()
                    report(done)
        finally:
            pool.shutdown(cancel_futures=True)


def _write(
    task: _Task, report: Callable[[int], None] = lambda documents: None, before: int = 0
) -> int:
    """Write the signatures of a part; return the number of documents, with those before."""
    rows = task.source.read_part(task.part)
    return before + write_signatures(
        rows, task.config, task.folder, lambda documents: report(before + documents)
    )


def _open(config: CleaningConfig, tasks: Sequence[_Task]) -> _Pass:
    """Open the signatures of a source, and delete those of earlier documents or keys."""
    own = tasks[0].folder.parent
    for other in own.parent.iterdir():
        if other != own:
            shutil.rmtree(other)
    opened = (open_signatures(task.folder) for task in tasks)
    parts = [signatures for signatures in opened if signatures is not None]
    return _Pass(tasks[0].source.name, config, own.name, parts)


def _write_duplicates(passes: Sequence[_Pass], results: Path) -> None:
    """Find what is dropped, unless that was done with the same signatures and keys."""
    keys = {*COMPARED_KEYS}
    origin = "\n".join(
        f"{each.name} {each.fingerprint} {each.config.model_dump_json(include=keys)}"
        for each in passes
    )
    file = results / _ORIGIN_FILE
    if not file.exists() or file.read_text() != origin:
        shutil.rmtree(results, ignore_errors=True)
        atomic_replace(results, partial(_fill, passes, origin))


def _fingerprint(dropped: np.ndarray, names: Sequence[str]) -> str:
    """Return what changes with what is dropped of a source, but not with other sources."""
    originals, dropped["source"] = np.unique(dropped["source"], return_inverse=True)
    named = ",".join(names[source] for source in originals)
    return hashlib.sha256(dropped.tobytes() + named.encode()).hexdigest()[:16]


def _fill(passes: Sequence[_Pass], origin: str, folder: Path) -> None:
    """Write a file for each source of what is dropped."""
    folder.mkdir(parents=True)
    ends = np.cumsum([each.starts[-1] for each in passes])
    begins = (ends - [each.starts[-1] for each in passes]).tolist()
    parts = [
        PartSignatures(each.config, begin + start, part)
        for each, begin in zip(passes, begins, strict=True)
        for start, part in zip(each.starts[:-1], each.parts, strict=True)
    ]
    found = find_duplicates(*make_comparisons(parts))
    pending = next(found, None)

    def rows(begin: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
        nonlocal pending
        while pending is not None and pending.document < end:
            document, image, key, original = pending
            source = int(np.searchsorted(ends, original, "right"))
            number = original - begins[source]
            yield document - begin, image, COMPARED_KEYS.index(key), source, number
            pending = next(found, None)

    for each, begin, end in zip(passes, begins, ends.tolist(), strict=True):
        np.save(folder / f"{each.name}.npy", np.fromiter(rows(begin, end), DROPPED))
    atomic_write(folder / _ORIGIN_FILE, origin)
