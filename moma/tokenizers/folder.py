"""A folder of tokenizers: text tokenizer, image codec and vocabulary.

    texts  → `make_text_tokenizer` → tokenizer.json ─┐
    images → `make_codec`          → codec/ ─────────┴→ vocabulary.json

Each of the three is complete or missing; `complete` does what a kill between them left undone.
"""

import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from moma.data.outputs import TOKENIZER_ENTRIES, is_output, mark_output
from moma.errors import UserError
from moma.files import atomic_replace, atomic_write
from moma.progress import show_progress
from moma.recipe import check
from moma.runs import Run, Tokenizers
from moma.runtime.weights import read_json_object
from moma.runtime.world import World, on_rank_0
from moma.tokenizers.image.codec import CodecConfig, ImageCodec, read_codec_config
from moma.tokenizers.image.metrics import CodecMetrics, measure_codec
from moma.tokenizers.image.train import CodecTrainingConfig, train_codec
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
        codec: determines the number of image codes and, if the folder has no codec, of codes per
            image.

    Raises:
        UserError: there is one already, its vocabulary is too small, or it does not fit the codec.
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
    world: World,
    quiet: bool = False,
) -> None:
    """Train the image codec of a folder, or resume its training in `codec_training/`.

    Args:
        config, training, images, held_out, seed, world: as for `train_codec`.
        folder: where to write; `metrics.json` in the codec's folder holds its `CodecMetrics`.

    Raises:
        UserError: there is a codec already, there are no images, or the interrupted training in
            the folder has another configuration.
    """
    on_rank_0(world, _begin_codec, config, folder)
    with show_progress("image codec", training.steps, quiet or world.rank > 0) as report:
        codec = train_codec(
            config,
            training,
            images,
            held_out,
            seed=seed,
            world=world,
            folder=folder.path / _TRAINING,
            progress=lambda record: report(record["step"], f"L1 {record['absolute_error']:.3f}"),
        )
    on_rank_0(world, lambda: _finish_codec(codec, images, held_out, folder, config))


def _begin_codec(config: CodecConfig, folder: Tokenizers) -> None:
    """Check that a codec may be trained in a folder, and mark the folder as moma's."""
    _require_absent(folder.codec)
    if not is_output(folder.path / _TRAINING):
        _require_absent(folder.path / _TRAINING)
    if folder.text.exists():
        vocabulary = _vocabulary_in(folder.text, config.codes_per_image)
        _require_fit(len(vocabulary.image_codes), config.codebook_size, folder)
    mark_output(folder.path, *TOKENIZER_ENTRIES)


def _finish_codec(
    codec: ImageCodec,
    images: Sequence[Tensor],
    held_out: Sequence[Tensor],
    folder: Tokenizers,
    config: CodecConfig,
) -> None:
    _write_codec(codec, folder, measure_codec(codec, images, held_out))
    complete(folder, config)


def read_metrics(folder: Tokenizers) -> CodecMetrics:
    """The quality of a folder's codec, measured when it was trained.

    Raises:
        UserError: it was not trained here, or the file is damaged.
    """
    file = folder.codec / _METRICS_FILE
    return check(CodecMetrics, read_json_object(file), str(file))


def import_tokenizers(tokenizer: Path, codec: ImageCodec, folder: Tokenizers) -> Vocabulary:
    """Make a folder of tokenizers from an existing tokenizer file and codec.

    Args:
        tokenizer: the tokenizer file, or a folder with a `tokenizer.json`.

    Raises:
        UserError: a file cannot be read, the folder has tokenizers already, or the two do not fit.
    """
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not file.is_file():
        raise UserError(f"{file}: there is no such tokenizer file; name one or its folder")
    # An import that was killed before its end is completed.
    is_partial = folder.text.exists() and not folder.vocabulary.exists()
    if not (is_partial and folder.text.read_bytes() == file.read_bytes()):
        _require_absent(folder.text)
        _require_absent(folder.codec)
    vocabulary = _vocabulary_in(file, codec.codes_per_image)
    _require_fit(len(vocabulary.image_codes), codec.config.codebook_size, folder)
    mark_output(folder.path, *TOKENIZER_ENTRIES)
    atomic_replace(folder.text, partial(shutil.copyfile, file))
    if not folder.codec.exists():
        _write_codec(codec, folder)
    vocabulary.save(folder.vocabulary)
    return vocabulary


def complete(folder: Tokenizers, codec: CodecConfig) -> bool:
    """Do what remains to be done once tokenizer or codec exist, also after a kill.

    Args:
        codec: determines the codes per image if there is neither codec nor vocabulary.

    Returns:
        Whether anything remained.
    """
    checkpoints = Run(folder.path / _TRAINING).checkpoints
    is_trained = folder.codec.exists() and checkpoints.exists()
    if is_trained:
        shutil.rmtree(checkpoints)
    if not folder.text.exists():
        return is_trained
    known = Vocabulary.load(folder.vocabulary) if folder.vocabulary.exists() else None
    if folder.codec.exists():
        codes_per_image = read_codec_config(folder.codec).codes_per_image
    else:
        codes_per_image = known.codes_per_image if known else codec.codes_per_image
    vocabulary = _vocabulary_in(folder.text, codes_per_image)
    if vocabulary == known:
        return is_trained
    vocabulary.save(folder.vocabulary)
    return True


def is_made(part: Path, folder: Tokenizers, codec: CodecConfig) -> bool:
    """Whether a command that was killed at its end has made a part; the folder is then completed.

    Args:
        part: the tokenizer or the codec of the folder.
        folder, codec: as for `complete`.

    Raises:
        UserError: the part exists, and nothing remained to be done.
    """
    if not part.exists():
        return False
    if not complete(folder, codec):
        _require_absent(part)
    return True


def _vocabulary_in(file: Path, codes_per_image: int) -> Vocabulary:
    tokenizer = load_text_tokenizer(file)
    try:
        return vocabulary_of(tokenizer, codes_per_image)
    except UserError as error:
        raise UserError(f"{file}: {error}; use another tokenizer") from error


def _require_absent(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path}: exists already; choose another --out or delete it")


def _require_fit(codes: int, codebook_size: int, folder: Tokenizers) -> None:
    if codes != codebook_size:
        raise UserError(
            f"{folder.path}: the tokenizer has {codes} image codes and the codec has "
            f"{codebook_size}; make both with the same codec.codebook_size"
        )


def _write_codec(
    codec: ImageCodec, folder: Tokenizers, metrics: CodecMetrics | None = None
) -> None:
    def fill(path: Path) -> None:
        codec.save(path)
        if metrics:
            (path / _METRICS_FILE).write_text(metrics.model_dump_json(indent=2) + "\n")

    atomic_replace(folder.codec, fill)
