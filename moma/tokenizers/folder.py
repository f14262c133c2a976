"""A folder of tokenizers, made piece by piece: text tokenizer, image codec, vocabulary.

    texts    → `make_text_tokenizer` → tokenizer.json ─┐
    pictures → `make_codec`          → codec/ ─────────┴→ vocabulary.json

`import_chameleon` makes all three from Chameleon's files. The vocabulary is written as soon as both
others are there; the folder can then be named as `data.tokenizers`.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moma.errors import UserError
from moma.progress import show_progress
from moma.runs import Tokenizers
from moma.tokenizers.chameleon import load_chameleon_codec
from moma.tokenizers.image import CodecConfig, ImageCodec
from moma.tokenizers.image_log import CodecLog
from moma.tokenizers.image_training import (
    STATE_FILE,
    CodecTrainingConfig,
    measure_codec,
    train_codec,
)
from moma.tokenizers.text import (
    TextTokenizerConfig,
    load_text_tokenizer,
    train_text_tokenizer,
    vocabulary_of,
)
from moma.vocabulary import Vocabulary

_TRAINING = "codec_training"


def make_text_tokenizer(
    config: TextTokenizerConfig, codebook_size: int, texts: Iterable[str], folder: Tokenizers
) -> Tokenizer:
    """Train the text tokenizer of a folder.

    Raises:
        UserError: there is one already, its vocabulary has no room, or it does not fit the codec.
    """
    _require_absent(folder.text)
    if folder.codec.exists():
        _require_fit(codebook_size, ImageCodec.load(folder.codec).config.codebook_size, folder)
    tokenizer = train_text_tokenizer(config, texts, codebook_size)
    folder.path.mkdir(parents=True, exist_ok=True)
    _place_text(tokenizer.to_str(pretty=True), folder)
    _complete(folder)
    return tokenizer


def make_codec(
    config: CodecConfig,
    training: CodecTrainingConfig,
    pictures: Sequence[Tensor],
    held_out: Sequence[Tensor],
    folder: Tokenizers,
    seed: int,
    device: torch.device,
    quiet: bool = False,
) -> dict[str, float]:
    """Train the image codec of a folder, or go on; `codec_training/` keeps log and state.

    Args:
        config, training, seed, device: as for `train_codec`.
        pictures: what it learns from.
        held_out: what it is measured on; if there are none, the pictures that it learns from.
        folder: where the codec goes.
        quiet: whether to show no progress.

    Returns:
        The last measurement, by the names in `CodecMetrics`.

    Raises:
        UserError: there is a codec already, there are no pictures, or the unfinished training in
            the folder has other settings.
    """
    _require_absent(folder.codec)
    if folder.text.exists():
        vocabulary = vocabulary_of(load_text_tokenizer(folder.text), config.codes_per_side**2)
        _require_fit(len(vocabulary.image_codes), config.codebook_size, folder)
    work = folder.path / _TRAINING
    measured = held_out if len(held_out) else pictures
    with show_progress("image codec", training.steps, quiet) as report:
        codec = train_codec(
            config,
            training,
            pictures,
            seed=seed,
            device=device,
            folder=work,
            progress=lambda state: report(state.step, f"L1 {state.absolute_error:.3f}"),
            log=CodecLog(work, measured),
        )
    metrics = asdict(measure_codec(codec, measured))
    place_codec(codec, folder, metrics)
    (work / STATE_FILE).unlink()
    _complete(folder)
    return metrics


def import_chameleon(
    tokenizer: Path, weights: Path, folder: Tokenizers, picture_size: int | None = None
) -> Vocabulary:
    """Make a folder of tokenizers from Chameleon's files.

    Args:
        tokenizer: its tokenizer file; a folder that holds a `tokenizer.json` will do.
        weights: its picture weights; see `load_chameleon_codec`.
        folder: where they go.
        picture_size: see `load_chameleon_codec`.

    Raises:
        UserError: a file cannot be read, the folder has tokenizers already, or the two do not fit.
    """
    _require_absent(folder.text)
    _require_absent(folder.codec)
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    codec = load_chameleon_codec(weights, picture_size)
    vocabulary = vocabulary_of(_read(file), codec.codes_per_image)
    _require_fit(len(vocabulary.image_codes), codec.config.codebook_size, folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    _place_text(file.read_text(encoding="utf-8"), folder)
    place_codec(codec, folder, {})
    vocabulary.save(folder.vocabulary)
    return vocabulary


def _complete(folder: Tokenizers) -> None:
    """Write the vocabulary if tokenizer and codec are both there."""
    if folder.text.exists() and folder.codec.exists():
        codes_per_image = ImageCodec.load(folder.codec).codes_per_image
        vocabulary_of(load_text_tokenizer(folder.text), codes_per_image).save(folder.vocabulary)


def _require_absent(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path}: is there already; choose another --out or delete it")


def _require_fit(named: int, codebook_size: int, folder: Tokenizers) -> None:
    if named != codebook_size:
        raise UserError(
            f"{folder.path}: the tokenizer names {named} image codes and the codec has "
            f"{codebook_size}; make both with the same codec.codebook_size"
        )


def _read(file: Path) -> Tokenizer:
    if not file.is_file():
        raise UserError(f"{file}: there is no such tokenizer file")
    return load_text_tokenizer(file)


def _place_text(text: str, folder: Tokenizers) -> None:
    partial = folder.text.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder.text)


def place_codec(codec: ImageCodec, folder: Tokenizers, metrics: dict[str, float]) -> None:
    """Put a codec in place whole."""
    whole = folder.codec.with_name(folder.codec.name + ".whole")
    shutil.rmtree(whole, ignore_errors=True)
    codec.save(whole)
    if metrics:
        (whole / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    whole.rename(folder.codec)
