"""From documents to encoded shards: tokenizers trained or loaded, then every source encoded.

    sources → texts → BPE ─┐
            → pictures → codec ─┴→ vocabulary → shards/SOURCE

Each part is written whole or not at all and is not made again, so that an interrupted preparation
goes on where it was.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moma.data.batches import DataConfig
from moma.data.documents import (
    Document,
    Picture,
    Source,
    accepted,
    held_out_share,
    is_held_out,
)
from moma.data.encoding import encode_source
from moma.errors import UserError
from moma.progress import show_progress
from moma.runs import Tokenizers
from moma.tokenizers.image import CodecConfig, ImageCodec, preprocess
from moma.tokenizers.image_training import (
    CodecProgress,
    CodecTrainingConfig,
    measure_codec,
    train_codec,
)
from moma.tokenizers.text import (
    TextTokenizerConfig,
    encode_texts,
    load_text_tokenizer,
    train_text_tokenizer,
    vocabulary_of,
)
from moma.vocabulary import Vocabulary


class PictureTensors(Sequence[Tensor]):
    """Pictures as the codec reads them, each decoded when it is asked for: float [3, H, W]."""

    def __init__(self, pictures: Sequence[Picture], size: int):
        self.pictures, self.size = pictures, size

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return preprocess(self.pictures[index].read(), self.size)


def prepare(
    data: DataConfig,
    text_tokenizer: TextTokenizerConfig,
    codec: CodecConfig,
    codec_training: CodecTrainingConfig,
    seed: int,
    device: torch.device,
    quiet: bool = False,
) -> Vocabulary:
    """Make `data.path` ready for training: tokenizer, codec and shards.

    Raises:
        UserError: a document cannot be read, or the folder was prepared with other settings.
    """
    folder = Tokenizers(data.path)
    folder.path.mkdir(parents=True, exist_ok=True)
    note, settings = _claim(data.path, text_tokenizer, codec, codec_training, data.tokenizers, seed)
    if data.tokenizers is not None and not folder.vocabulary.exists():
        _load_tokenizers(Tokenizers(data.tokenizers), folder)
        _save_text(str(note), settings)
    if not folder.text.exists():
        tokenizer = train_text_tokenizer(
            text_tokenizer, _training_texts(data, text_tokenizer.documents), codec.codebook_size
        )
        # Not before: settings that were refused must not bind the folder.
        _save_text(str(note), settings)
        _save_text(str(folder.text), tokenizer.to_str(pretty=True))
    if not folder.codec.exists():
        _make_codec(data, codec, codec_training, seed, device, folder.codec, quiet)
    codes_per_image = ImageCodec.load(folder.codec).codes_per_image
    vocabulary = vocabulary_of(load_text_tokenizer(folder.text), codes_per_image)
    vocabulary.save(folder.vocabulary)
    for source in data.sources:
        _encode(source, data, folder, vocabulary, device, quiet)
    return vocabulary


def training_documents(source: Source, default_share: float) -> Iterator[Document]:
    """The documents of a source that are not held out.

    Args:
        source: where the documents come from.
        default_share: share of the documents held out, where the source has none of its own.
    """
    return documents_of_split(source, default_share, held_out=False)


def documents_of_split(source: Source, default_share: float, held_out: bool) -> Iterator[Document]:
    """The documents of a source that are held out, or that are not."""
    share = held_out_share(source, default_share)
    return (d for d in accepted(source.documents()) if is_held_out(d, share) == held_out)


def encode_pictures(
    codec: ImageCodec, device: torch.device, pictures: Sequence[Image.Image]
) -> np.ndarray:
    """Codes of pictures of any size, int64 of shape [pictures, codes_per_image]."""
    batch_B3HW = torch.stack([preprocess(p, codec.config.picture_size) for p in pictures])
    return codec.encode(batch_B3HW.to(device)).cpu().numpy()


def _claim(path: Path, *settings: object) -> tuple[Path, str]:
    """The note of what the folder is prepared with; refuses if that was something else."""
    text = json.dumps([str(part) for part in settings])
    note = path / "prepared_with.json"
    if note.exists() and note.read_text() != text:
        raise UserError(
            f"{path}: was prepared with other tokenizer or codec settings or another seed; "
            "choose another folder with data.path=…, or delete this one"
        )
    return note, text


def _load_tokenizers(source: Tokenizers, folder: Tokenizers) -> None:
    for needed in (source.text, source.codec, source.vocabulary):
        if not needed.exists():
            raise UserError(f"{needed}: is missing; data.tokenizers names no prepared folder")
    source.copy_to(folder)


def _training_texts(data: DataConfig, documents: int) -> Iterator[str]:
    for source in data.sources:
        for document in islice(training_documents(source, data.held_out), documents):
            yield from (segment for segment in document.segments if isinstance(segment, str))


def _pictures_of(data: DataConfig, held_out: bool, documents: int) -> list[Picture]:
    chosen = (documents_of_split(source, data.held_out, held_out) for source in data.sources)
    return [
        segment
        for source in chosen
        for document in islice(source, documents)
        for segment in document.segments
        if isinstance(segment, Picture)
    ]


def _make_codec(
    data: DataConfig,
    config: CodecConfig,
    training: CodecTrainingConfig,
    seed: int,
    device: torch.device,
    folder: Path,
    quiet: bool,
) -> None:
    """Train the codec, measure it on held-out pictures, and put both in place at once."""
    pictures = PictureTensors(_pictures_of(data, False, training.documents), config.picture_size)
    if not len(pictures):
        raise UserError("no source holds a picture, so there is nothing to train a codec on")
    work = folder.with_name(folder.name + ".partial")
    with show_progress("image codec", training.steps, quiet) as report:

        def note(state: CodecProgress) -> None:
            report(state.step, f"L1 {state.absolute_error:.3f}")

        codec = train_codec(
            config, training, pictures, seed=seed, device=device, folder=work, progress=note
        )
    held_out = PictureTensors(_pictures_of(data, True, training.documents), config.picture_size)
    metrics = asdict(measure_codec(codec, held_out if len(held_out) else pictures))
    # A few held-out pictures may not need every code: its use is told from the training pictures.
    everything = measure_codec(codec, pictures)
    metrics |= {"codes_used": everything.codes_used, "perplexity": everything.perplexity}
    whole = folder.with_name(folder.name + ".whole")
    shutil.rmtree(whole, ignore_errors=True)
    codec.save(whole)
    (whole / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    whole.rename(folder)
    shutil.rmtree(work, ignore_errors=True)


def _encode(
    source: Source,
    data: DataConfig,
    folder: Tokenizers,
    vocabulary: Vocabulary,
    device: torch.device,
    quiet: bool,
) -> None:
    tokenizer = load_text_tokenizer(folder.text)
    codec = ImageCodec.load(folder.codec).to(device)
    done = 0
    with show_progress(f"encode {source.name}", None, quiet) as report:

        def advance(documents: int) -> None:
            nonlocal done
            done += documents
            report(done, "documents")

        encode_source(
            source,
            partial(encode_texts, tokenizer),
            partial(encode_pictures, codec, device),
            vocabulary,
            held_out_share(source, data.held_out),
            data.folder(source.name),
            encoders=_digest(folder),
            progress=advance,
        )


def _digest(folder: Tokenizers) -> str:
    """Digest of the tokenizer and the codec, weights included."""
    files = [folder.text, *sorted(folder.codec.glob("*"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _save_text(path: str, text: str) -> None:
    partial_path = Path(path + ".partial")
    partial_path.write_text(text)
    partial_path.rename(path)
