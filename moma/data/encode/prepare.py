"""From documents to encoded shards: tokenizers trained or copied, then every source encoded.

Each part is written atomically and is not made again, so that an interrupted preparation continues
where it was. Documents that cannot be used are listed in `rejected.jsonl`.
"""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from moma.data.batches.budget import Budget
from moma.data.batches.iterator import Batches
from moma.data.cleaning.clean import Cleaning
from moma.data.cleaning.passes import provide_cleaning
from moma.data.config import PrepareConfig
from moma.data.documents import SourceConfig, SourcePart, held_out_share
from moma.data.encode.executors import (
    MIN_POOL_BYTES,
    Executor,
    InProcess,
    LocalPool,
    local_devices,
    spare_cores,
)
from moma.data.encode.parts import PartialShards, copy_rejected
from moma.data.encode.progress import JobProgress, show_job
from moma.data.encode.publish import publish_shards, publish_tokenizers
from moma.data.encode.ray_cluster import RayCluster
from moma.data.encode.rejected import all_held_out
from moma.data.encode.shares import (
    Share,
    await_tokenizers,
    require_address,
    warn_of_other_parts,
)
from moma.data.encode.source import SourceEncoding
from moma.data.encode.tokenizers import provide_tokenizers
from moma.data.encode.upload import Remote
from moma.data.encode.worker import Encoded, Job, Task
from moma.data.outputs import CLEANING_FOLDER, DATA_KIND, DATA_MANIFEST, has_manifest
from moma.data.provenance import DataFolder
from moma.data.remote.fetching import fetch_prepared
from moma.data.shards import REJECTED_FILE, PartRecord, ShardInfo
from moma.errors import StorageError, UserError, list_names
from moma.files import atomic_open, lock_folder
from moma.runs import Tokenizers
from moma.runtime.allocator import keep_freed_memory
from moma.vocabulary import Vocabulary

# Seconds to wait for another process that prepares the same folder.
LOCK_TIMEOUT = 10.0
# Seconds to count a source's documents for the progress bar.
MAX_COUNTING_SECONDS = 30.0


@dataclass(frozen=True)
class Options:
    """How the sources are encoded; see `prepare`."""

    device: torch.device
    quiet: bool
    processes: int | None
    verify: bool
    ray: str | None
    share: Share | None

    def has(self, source: int, part: int) -> bool:
        """Return whether a part is to be encoded here."""
        return self.share is None or self.share.has(source, part)


@dataclass(frozen=True)
class Prepared:
    """A prepared data folder.

    Attributes:
        vocabulary: the ids.
        sources: origin and counts of each source's shards.
        missing: numbers of the parts, by source, that other machines are still to encode.
    """

    vocabulary: Vocabulary
    sources: dict[str, ShardInfo]
    missing: dict[str, list[int]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Count documents, tokens, images, rejected and dropped ones, in total and by source."""
        sources = {name: _summary(info.whole) for name, info in self.sources.items()}
        missing = sum(map(len, self.missing.values()))
        return {**_summary(_together(self.sources)), "missing_parts": missing, "sources": sources}


def _together(infos: dict[str, ShardInfo]) -> PartRecord:
    return sum((info.whole for info in infos.values()), PartRecord())


def _summary(part: PartRecord) -> dict[str, Any]:
    held_out = part.counts["held_out"].model_dump()
    return {
        **part.total.model_dump(),
        "rejected": part.rejected,
        "held_out": held_out,
        "dropped": part.dropped,
        "dropped_images": part.dropped_images,
    }


def prepare(
    config: PrepareConfig,
    device: torch.device,
    quiet: bool = False,
    processes: int | None = None,
    verify: bool = False,
    ray: str | None = None,
    share: Share | None = None,
) -> Prepared:
    """Write tokenizer, codec and shards into `data.path`, and to `data.remote` if there is one.

    Args:
        config: a recipe, or the part of it that is prepared.
        device: where the codec is trained and run.
        processes: maximum processes, by default as many as there are cores. It does not change
            what is written.
        verify: whether to read all shards and to make damaged ones again.
        ray: address of a Ray cluster that encodes, "auto" for the one of this machine.
        share: encode only these parts; whoever encodes the last ones of all completes the shards.

    Raises:
        UserError: the recipe's image share is impossible, too many documents of a source cannot
            be used, nothing is left for training, the documents cannot be packed as the recipe
            asks, the folder was prepared with another configuration or has files of the user's in
            the way, or another process is using it.
    """
    keep_freed_memory(device)
    data = config.data
    if share is not None:
        require_address(share, data)
    _check_budget(config)
    data.path.mkdir(parents=True, exist_ok=True)
    with lock_folder(data.path, LOCK_TIMEOUT):
        prepared = _prepare_folder(config, Options(device, quiet, processes, verify, ray, share))
    if prepared.missing:
        return prepared
    counts = _together(prepared.sources).counts
    if not counts["train"].documents:
        raise all_held_out(counts["held_out"].documents)
    _check_packing(config, prepared.vocabulary)
    return prepared


def _prepare_folder(config: PrepareConfig, options: Options) -> Prepared:
    """Prepare a data folder that no other process uses."""
    data, quiet = config.data, options.quiet
    fetch_prepared(data)
    if options.share is not None:
        await_tokenizers(data, options.share)
    folder = DataFolder(data)
    clean_folder = data.path / CLEANING_FOLDER
    cleaning = provide_cleaning(
        data.sources, clean_folder, data.part_bytes, quiet, options.processes
    )
    vocabulary = provide_tokenizers(config, folder, options.device, quiet)
    if data.remote is not None:
        publish_tokenizers(folder)
    _warn_changed_sources(folder)
    return _encode_all(folder, cleaning, vocabulary, options)


def _check_budget(config: PrepareConfig) -> None:
    """Refuse an image share that no micro-batch can have before any work is done."""
    data = config.data
    # A file of the user's is refused later, with another message.
    own = [data.path] if has_manifest(data.path, DATA_MANIFEST, DATA_KIND) else []
    folders = [Tokenizers(path) for path in (*own, data.tokenizers) if path is not None]
    existing = next((each.vocabulary for each in folders if each.vocabulary.exists()), None)
    # Of a vocabulary that is still to be made, only the sizes are known; the ids are arbitrary.
    sizes = config.text_tokenizer.vocabulary_size, config.codec.codes_per_image
    outline = Vocabulary(sizes[0], 0, 1, 2, 3, 4, (), sizes[1])
    Budget.from_config(data, Vocabulary.load(existing) if existing else outline)


def _warn_changed_sources(folder: DataFolder) -> None:
    if changed := folder.changed_sources():
        print(
            f"note: added or changed since tokenizer and codec in {folder.data.path} were trained: "
            f"{list_names(changed)}; both are kept, as is right if only some documents were fixed; "
            "to train new ones, choose another data.path; a run keeps the documents it began with: "
            "train on these with another run=…",
            file=sys.stderr,
        )


def _check_packing(config: PrepareConfig, vocabulary: Vocabulary) -> None:
    """Refuse what training would refuse; the shards are kept, and serve other recipes."""
    try:
        Batches(config.data, vocabulary, config.seed).close()
    except StorageError:
        raise
    except UserError as error:
        raise UserError(
            f"{config.data.path}: is prepared, but cannot be trained on with this recipe: {error}"
        ) from error


def _encode_all(
    folder: DataFolder,
    cleaning: Mapping[str, Cleaning],
    vocabulary: Vocabulary,
    options: Options,
) -> Prepared:
    """Encode every source; `rejected.jsonl` lists the rejected documents of all."""
    job = make_job(folder, cleaning, vocabulary)
    infos: dict[str, ShardInfo] = {}
    shards: dict[str, PartialShards] = {}
    try:
        for index, (name, encoding) in enumerate(job.sources.items()):
            if (info := encoding.find_complete(options.verify)) is not None:
                infos[name] = info
            else:
                is_own = partial(options.has, index)
                shards[name] = encoding.begin(options.verify, is_own)
        if options.share is not None:
            _warn_of_other_parts(folder, shards.values())
        _encode(folder, job, shards, options)
        missing = _missing_parts(shards) if options.share is not None else {}
        _warn_of_other_parts(folder, [shards[name] for name in missing])
        for name in shards:
            if name not in missing:
                infos[name] = job.sources[name].finish(shards[name])
        if (remote := _remote(folder)) is not None:
            publish_shards(remote, folder, infos)
    finally:
        # One file for all sources, from those in the folders of their shards.
        with atomic_open(folder.data.path / REJECTED_FILE) as file:
            for source in folder.data.sources:
                copy_rejected(folder.data.folder(source.name), file)
    infos |= {name: shards[name].info for name in missing}
    return Prepared(vocabulary, {name: infos[name] for name in job.sources}, missing)


def _missing_parts(shards: Mapping[str, PartialShards]) -> dict[str, list[int]]:
    """Return the parts, by source, that neither this machine nor another one has encoded."""
    for unfinished in shards.values():
        unfinished.refresh()
    return {name: each.pending for name, each in shards.items() if each.pending}


def _warn_of_other_parts(folder: DataFolder, shards: Iterable[PartialShards]) -> None:
    if folder.data.remote is not None:
        folders = [path for each in shards for path in each.unpublished_folders()]
        warn_of_other_parts(folder.data.remote, folders)


def make_job(folder: DataFolder, cleaning: Mapping[str, Cleaning], vocabulary: Vocabulary) -> Job:
    """Return how the sources of a data folder are encoded with its tokenizers."""
    data, encoders = folder.data, folder.record_encoders()
    sources = {
        source.name: SourceEncoding(
            source,
            vocabulary,
            held_out_share(source, data.held_out),
            data.folder(source.name),
            encoders,
            data.shard_tokens,
            data.max_rejected,
            data.part_bytes,
            cleaning[source.name],
            _remote(folder),
        )
        for source in data.sources
    }
    return Job(sources, vocabulary, folder.tokenizers.path)


def _remote(folder: DataFolder) -> Remote | None:
    data = folder.data
    return None if data.remote is None else Remote(data.remote, data.cache_bytes, data.path)


def _encode(
    folder: DataFolder, job: Job, shards: Mapping[str, PartialShards], options: Options
) -> None:
    """Encode the parts that are not complete."""
    tasks = [
        Task(name, number, shards[name].plan[number])
        for name in shards
        for number in shards[name].own_pending
    ]
    if not tasks:
        return
    processes = spare_cores() + 1 if options.processes is None else options.processes
    executor, quiet = _executor(job, tasks, processes, options), options.quiet
    if processes > 1 or options.share is not None or options.ray is not None:
        _name_uncut(tasks, quiet)
    counts = [
        None if quiet or options.share is not None else count_documents(source, folder)
        for source in folder.data.sources
        if source.name in shards
    ]
    known = [count for count in counts if count is not None]
    total = sum(known) if len(known) == len(counts) else None
    with show_job(total, quiet) as display:
        progress = JobProgress(
            display,
            parts=sum(len(each.plan) - len(each.pending) for each in shards.values()) + len(tasks),
            size=sum(task.part.size for task in tasks),
            complete=sum((each.complete for each in shards.values()), PartRecord()),
            pending=len(tasks),
        )

        def note(encoded: Encoded) -> None:
            progress.note(encoded)
            source, number, _ = encoded.task
            if encoded.records is not None:
                job.sources[source].add(shards[source], number, encoded.records)

        executor.run(tasks, note)


def _name_uncut(tasks: Sequence[Task], quiet: bool) -> None:
    uncut = [task.source for task in tasks if task.part == SourcePart()]
    if uncut and not quiet:
        print(f"note: {read_from_the_beginning(uncut)}", file=sys.stderr)


def read_from_the_beginning(sources: Sequence[str]) -> str:
    """Return a text about sources that are a single part; see `SourceConfig.parts`."""
    return (
        f"{list_names(sources)}: can only be read from the beginning, so that a single process "
        "encodes each source; docs/prepare.md lists the sources that several processes encode"
    )


def _executor(job: Job, tasks: Sequence[Task], processes: int, options: Options) -> Executor:
    if options.ray is not None:
        return RayCluster(job, options.ray, options.processes)
    size = sum(task.part.size for task in tasks)
    is_small = options.processes is None and size < MIN_POOL_BYTES
    if processes == 1 or len(tasks) == 1 or is_small:
        return InProcess(job, options.device, processes)
    devices = local_devices(options.device)
    return LocalPool(job, processes, devices, shares_codec=options.device.type != "cpu")


def count_documents(source: SourceConfig, folder: DataFolder) -> int | None:
    """Return how many documents a source has, rejected ones included, for a progress bar.

    Counting reads no image. None if it takes long, for a stream, which would be downloaded twice,
    and for a source that has shards.
    """
    known = folder.known_documents(source)
    if known is not None:
        return known
    if getattr(source, "streaming", False) or folder.data.folder(source.name).exists():
        return None
    number, end = 0, time.monotonic() + MAX_COUNTING_SECONDS
    for _ in source.documents():
        number += 1
        if time.monotonic() > end:
            return None
    return number
