"""A folder of tokenizers, made piece by piece: text tokenizer, image codec, vocabulary.

    texts    → `make_text_tokenizer` → tokenizer.json ─┐
    images → `make_codec`          → codec/ ─────────┴→ vocabulary.json

`moma prepare` and `moma tokenizer` use the same functions; `import_tokenizers` takes parts that
exist already. The vocabulary is written as soon as there is a text tokenizer, and again once there
is a codec. Each part is there whole or not at all; `complete` does what a kill between two of them
left undone.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moma.data.outputs import TOKENIZER_ENTRIES, mark_output
from moma.errors import UserError
from moma.files import atomic_replace, atomic_write
from moma.progress import show_progress
from moma.runs import Tokenizers
from moma.tokenizers.image.codec import CodecConfig, ImageCodec, read_codec_config
from moma.tokenizers.image.log import CodecLog
from moma.tokenizers.image.metrics import measure_trained
from moma.tokenizers.image.train import STATE_FILE, CodecTrainingConfig, train_codec
from moma.tokenizers.text import (
    TextTokenizerConfig,
    load_text_tokenizer,
    train_text_tokenizer,
    vocabulary_of,
)
from moma.vocabulary import Vocabulary

_TRAINING = "codec_training"
_METRICS_FILE = "metrics.json"


def make_text_tokenizer(
    config: TextTokenizerConfig,
    codec: CodecConfig,
    texts: Iterable[str],
    folder: Tokenizers,
    quiet: bool = False,
) -> Tokenizer:
    """Train the text tokenizer of a folder.

    Args:
        config: how to train it.
        codec: tells how many image codes there are and, as long as the folder has no codec, how
            many an image takes.
        texts: what it learns from.
        folder: where it goes.
        quiet: whether to show no progress.

    Raises:
        UserError: there is one already, its vocabulary has no room, or it does not fit the codec.
    """
    _require_absent(folder.text)
    if folder.codec.exists():
        _require_fit(codec.codebook_size, read_codec_config(folder.codec).codebook_size, folder)
    with show_progress("text tokenizer", None, quiet) as report:
        tokenizer = train_text_tokenizer(config, texts, codec.codebook_size, report)
    mark_output(folder.path, *TOKENIZER_ENTRIES)
    atomic_write(folder.text, tokenizer.to_str(pretty=True))
    complete(folder, codec)
    return tokenizer


def make_codec(
    config: CodecConfig,
    training: CodecTrainingConfig,
    images: Sequence[Tensor],
    held_out: Sequence[Tensor],
    folder: Tokenizers,
    seed: int,
    device: torch.device,
    quiet: bool = False,
) -> None:
    """Train the image codec of a folder, or go on; `codec_training/` keeps log and state.

    Beside the codec stands what it achieves, the fields of `CodecMetrics`, in `metrics.json`.

    Args:
        config, training, seed, device: as for `train_codec`.
        images: what it learns from.
        held_out: what its error is measured on; if there are none, on what it learns from.
        folder: where the codec goes.
        quiet: whether to show no progress.

    Raises:
        UserError: there is a codec already, there are no images, or the unfinished training in
            the folder has other settings.
    """
    _require_absent(folder.codec)
    if folder.text.exists():
        vocabulary = vocabulary_of(load_text_tokenizer(folder.text), config.codes_per_image)
        _require_fit(len(vocabulary.image_codes), config.codebook_size, folder)
    mark_output(folder.path, *TOKENIZER_ENTRIES)
    work = folder.path / _TRAINING
    with show_progress("image codec", training.steps, quiet) as report:
        codec = train_codec(
            config,
            training,
            images,
            seed=seed,
            device=device,
            folder=work,
            progress=lambda state: report(state.step, f"L1 {state.absolute_error:.3f}"),
            log=CodecLog(work, images, held_out),
        )
    _place_codec(codec, folder, asdict(measure_trained(codec, images, held_out)))
    complete(folder, config)


def read_metrics(folder: Tokenizers) -> dict[str, Any]:
    """What the codec of a folder achieved when it was made, by the names in `CodecMetrics`.

    Raises:
        UserError: it was not made here, or its figures cannot be read.
    """
    file = folder.codec / _METRICS_FILE
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot read what the codec achieves ({error})") from error
    return values


def import_tokenizers(
    tokenizer: Path, load_codec: Callable[[], ImageCodec], folder: Tokenizers
) -> Vocabulary:
    """Make a folder of tokenizers from a tokenizer file and a codec that exist already.

    Args:
        tokenizer: the tokenizer file; a folder that holds a `tokenizer.json` will do.
        load_codec: returns the codec.
        folder: where they go.

    Raises:
        UserError: a file cannot be read, the folder has tokenizers already, or the two do not fit.
    """
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    begun = _is_begun(file, folder)
    if not begun:
        _require_absent(folder.text)
        _require_absent(folder.codec)
    codec = load_codec()
    vocabulary = vocabulary_of(_read(file), codec.codes_per_image)
    _require_fit(len(vocabulary.image_codes), codec.config.codebook_size, folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    if not begun:
        atomic_replace(folder.text, partial(shutil.copyfile, file))
    if not folder.codec.exists():
        _place_codec(codec, folder, {})
    vocabulary.save(folder.vocabulary)
    return vocabulary


def complete(folder: Tokenizers, codec: CodecConfig) -> bool:
    """Do what is left to do once tokenizer or codec is in place, also after a kill.

    Args:
        folder: of the tokenizers.
        codec: tells how many codes an image takes where there is neither codec nor vocabulary.

    Returns:
        Whether anything was left to do.
    """
    state = folder.path / _TRAINING / STATE_FILE
    trained = folder.codec.exists() and state.exists()
    if trained:
        state.unlink()
    if not folder.text.exists():
        return trained
    known = Vocabulary.load(folder.vocabulary) if folder.vocabulary.exists() else None
    if folder.codec.exists():
        codes_per_image = read_codec_config(folder.codec).codes_per_image
    else:
        codes_per_image = known.codes_per_image if known else codec.codes_per_image
    vocabulary = vocabulary_of(load_text_tokenizer(folder.text), codes_per_image)
    if vocabulary == known:
        return trained
    vocabulary.save(folder.vocabulary)
    return True


def is_made(part: Path, folder: Tokenizers, codec: CodecConfig) -> bool:
    """Whether a run that was killed at its end has put a part in place; the rest is then done.

    Args:
        part: the tokenizer or the codec of the folder.
        folder, codec: as for `complete`.

    Raises:
        UserError: the part is there, and nothing was left to do.
    """
    if not part.exists():
        return False
    if not complete(folder, codec):
        _require_absent(part)
    return True


def _require_absent(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path}: is there already; choose another --out or delete it")


def _require_fit(named: int, codebook_size: int, folder: Tokenizers) -> None:
    if named != codebook_size:
        raise UserError(
            f"{folder.path}: the tokenizer names {named} image codes and the codec has "
            f"{codebook_size}; make both with the same codec.codebook_size"
        )


def _is_begun(file: Path, folder: Tokenizers) -> bool:
    """Whether an import of this tokenizer file was killed before its end."""
    placed = file.is_file() and folder.text.exists() and not folder.vocabulary.exists()
    return placed and folder.text.read_bytes() == file.read_bytes()


def _read(file: Path) -> Tokenizer:
    if not file.is_file():
        raise UserError(f"{file}: there is no such tokenizer file")
    return load_text_tokenizer(file)


def _place_codec(codec: ImageCodec, folder: Tokenizers, metrics: dict[str, Any]) -> None:
    def fill(path: Path) -> None:
        codec.save(path)
        if metrics:
            (path / _METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n")

    atomic_replace(folder.codec, fill)
