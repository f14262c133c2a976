"""Small vocabularies, tokenizers, sources and recipes; a test names only what it depends on.

vocabularies  `make_vocabulary`
tokenizers    `codec_config`, `make_codec` (random weights), `text_tokenizer`, `make_tokenizers`
images        `solid_image` (a reference), `image_bytes` (a file's content), `two_colored_images`
              and `random_images` (tensors, as codecs take them)
documents     `ListSource`
files         `write_captions`, `write_paragraphs`, `write_tar`, `write_parquet`, `write_pages`,
              `write_icons`; `write_sources` (captions and text for `tiny_recipe`)
operations    `OperationCounter`
models        `set_thresholds`
runs          `replace_weights`
recipes       `tiny_recipe`, `values_of_recipe`, `write_recipe`, `write_minimal_recipe`
              (with only the required keys), `synthetic_recipe` (without data)
tokens        `make_segments`, `make_context` (what layers know of packed documents)
"""

import io
import json
import math
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tomli_w
import torch
from PIL import Image
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moma.data.documents import Document, ImageRef, Rejected, SourceConfig, SourceName
from moma.model.attention_kernels import (
    AttentionKernel,
    MaskedAttention,
    Segments,
    number_segments,
)
from moma.model.decoder_layer import TokenContext
from moma.model.transformer import Transformer
from moma.recipe import Config, check, to_toml
from moma.runs import Run, Tokenizers
from moma.runtime.checkpoint import (
    checkpoints_in,
    read_state,
    save_weights,
    step_of,
    stored_weights,
)
from moma.runtime.weights import Weights
from moma.tokenizers.image.codec import CodecConfig, ImageCodec
from moma.tokenizers.text import TextTokenizerConfig, train_text_tokenizer, vocabulary_of
from moma.train.recipe import Recipe
from moma.vocabulary import Vocabulary

COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "black": (0, 0, 0)}

_MINIMAL = """
[data]
path = "data"
micro_batch_size = 2
sequence_length = 64
image_share = 0.5
sources = [{kind = "captions", path = "images"}, {kind = "text", path = "words.txt"}]
"""
# Codes of 16 × 16 images: 4 × 4 of them, of 16 kinds.
CODEC: dict[str, Any] = {
    "image_size": 16,
    "patch": 4,
    "block_channels": [8],
    "layers_per_block": 1,
    "latent_channels": 8,
    "code_channels": 8,
    "codebook_size": 16,
    "encoder_middle": False,
    "middle_attention": False,
    "norm_groups": 4,
}


def make_vocabulary(
    size: int = 40, codes: Iterable[int] = range(5, 21), codes_per_image: int = 4, **special: int
) -> Vocabulary:
    """Special ids 0 … 4, in the order of the fields, then the ids of the image codes."""
    ids = {"beginning": 0, "end": 1, "padding": 2, "begin_image": 3, "end_image": 4, **special}
    return Vocabulary(size=size, image_codes=tuple(codes), codes_per_image=codes_per_image, **ids)


def codec_config(**changes: Any) -> CodecConfig:
    """A codec that trains in milliseconds."""
    return CodecConfig.model_validate(CODEC | changes)


def make_codec(seed: int = 0, **changes: Any) -> ImageCodec:
    """A codec with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ImageCodec(codec_config(**changes)).eval()


def two_colored_images(count: int = 30) -> list[torch.Tensor]:
    """Images of 16 × 16 in [−1, 1], as tensors: easy to learn, unlike each other."""
    colors = torch.rand(count, 3, 2, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return list(colors.repeat_interleave(8, 2).expand(count, 3, 16, 16))


def random_images(count: int, size: int = 16, seed: int = 1) -> torch.Tensor:
    """Images of noise in [−1, 1], [count, 3, size, size]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, size, size, generator=draw) * 2 - 1


def text_tokenizer(
    size: int = 320,
    codes: int = CODEC["codebook_size"],
    texts: Iterable[str] = ("the red apple",) * 9,
) -> Tokenizer:
    """A byte-level tokenizer of `size` ids, `codes` of them image codes."""
    return train_text_tokenizer(TextTokenizerConfig(vocabulary_size=size), texts, codes)


def make_tokenizers(folder: Path, seed: int = 0, size: int = 320, **changes: Any) -> Tokenizers:
    """A folder with a tokenizer of `size` ids, a random codec and their vocabulary."""
    tokenizers, codec = Tokenizers(folder), make_codec(seed, **changes)
    tokenizer = text_tokenizer(size, codec.config.codebook_size)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(tokenizers.text))
    codec.save(tokenizers.codec)
    vocabulary_of(tokenizer, codec.config.codes_per_image).save(tokenizers.vocabulary)
    return tokenizers


def image_bytes(
    size: tuple[int, int] = (3, 2), color: Any = "red", kind: str = "PNG", **options: Any
) -> bytes:
    """The content of an image file of one color."""
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind, **options)
    return file.getvalue()


def solid_image(
    color: Any, size: tuple[int, int] = (2, 2), mode: str = "RGB", name: str = ""
) -> ImageRef:
    """An image of one color, made when it is read; it can be sent to another process."""
    return ImageRef(name, partial(Image.new, mode, size, color))


class ListSource(SourceConfig):
    """A source of given documents and rejected rows; a string becomes a document of that text."""

    name: SourceName = "listed"
    rows: tuple[Any, ...] = Field((), exclude=True)

    def __init__(self, *rows: Document | Rejected | str, name: str = "listed") -> None:
        documents = tuple(
            Document(f"doc {number}", (row,)) if isinstance(row, str) else row
            for number, row in enumerate(rows)
        )
        fields: dict[str, Any] = {"name": name, "rows": documents}
        super().__init__(**fields)

    def documents(self):
        return iter(self.rows)


def write_captions(
    folder: Path, captions: Mapping[str, str], images: Mapping[str, Image.Image | bytes]
) -> None:
    """Write a folder for `kind = "captions"`: a caption and an image (or a file's bytes) a name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        if isinstance(image, bytes):
            (folder / name).write_bytes(image)
        else:
            image.save(folder / name)
    rows = [json.dumps({"image": name, "caption": text}) for name, text in captions.items()]
    (folder / "captions.jsonl").write_text("".join(row + "\n" for row in rows))


def write_paragraphs(file: Path, paragraphs: Iterable[str]) -> None:
    """Write a file for `kind = "text"`, a document a paragraph."""
    file.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes | tuple[bytes, str]]], mode: Any = "w"
) -> Path:
    """Write a tar of names and contents; a pair is the type and target of a link or folder."""
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                archive.addfile(info)
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], row_group_size: int = 2) -> Path:
    """Write rows as one Parquet file."""
    table = pa.Table.from_pylist(list(rows))
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def write_pages(
    folder: Path,
    pages: Mapping[str, str | bytes],
    images: Iterable[str] = ("a.png",),
    side: int = 64,
) -> None:
    """Write HTML pages, and images of `side` × `side + 1` pixels that they may show."""
    for name, page in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(page if isinstance(page, bytes) else page.encode())
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side + 1)).save(folder / name)


def write_icons(
    folder: Path, sets: Mapping[str, Mapping[str, Any]], gray: Iterable[str] = (), **values: Any
) -> Path:
    """Write a package of icon sets, coloured but for `gray`; an icon is its body, or an object."""
    (folder / "json").mkdir(parents=True, exist_ok=True)
    collections = {}
    for prefix, icons in sets.items():
        named = {n: {"body": icon} if isinstance(icon, str) else icon for n, icon in icons.items()}
        text = json.dumps({"prefix": prefix, "icons": named, **values})
        (folder / "json" / f"{prefix}.json").write_text(text)
        name = f"{prefix.title()} Icons"
        collections[prefix] = {"name": name, "total": len(icons), "palette": prefix not in gray}
    (folder / "collections.json").write_text(json.dumps(collections))
    return folder


def write_sources(folder: Path) -> None:
    """24 colored squares with captions, and 60 sentences in `text.txt`."""
    images, captions, random = {}, {}, np.random.default_rng(0)
    for index in range(24):
        name = list(COLORS)[index % len(COLORS)]
        pixels = np.full((16, 16, 3), 255, dtype=np.uint8)
        left, top = random.integers(0, 8, 2)
        pixels[top : top + 8, left : left + 8] = COLORS[name]
        images[f"{index}.png"] = Image.fromarray(pixels)
        captions[f"{index}.png"] = f"a {name} square"
    write_captions(folder, captions, images)
    words = ["square", "paper", "colour", "of", "the", "on", "is", "red", "green", "blue"]
    write_paragraphs(folder / "text.txt", [" ".join(random.choice(words, 12)) for _ in range(60)])


def write_recipe(config: Config, path: Path) -> None:
    """Write a configuration with all its keys."""
    path.write_text(to_toml(config), encoding="utf-8")


def write_study(recipe: Recipe, folder: Path, study: Mapping[str, Any]) -> Path:
    """Write `study.toml` with a recipe and the table `[study]`; its runs are below `study`."""
    values = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    file = folder / "study.toml"
    changes = {"run": str(folder / "study"), "study": study}
    file.write_text(tomli_w.dumps(values | changes), encoding="utf-8")
    return file


def write_minimal_recipe(folder: Path) -> Path:
    """Write `recipe.toml` with only the required keys; its sources do not exist."""
    path = folder / "recipe.toml"
    path.write_text(_MINIMAL)
    return path


def values_of_recipe(folder: Path) -> dict[str, Any]:
    """The values of a user's recipe for `images`, with captions, and `words.txt` in a folder."""
    stage = {"steps": 4, "log_every": 2, "checkpoint_every": 2, "compile": False}
    return {
        "seed": 3,
        "run": f"{folder}/run",
        "text_tokenizer": {"vocabulary_size": 300},
        "codec": CODEC | {"image_size": 32, "block_channels": [8, 16]},
        "codec_training": {
            "steps": 4,
            "batch_size": 4,
            "warmup_steps": 1,
            "quantizer_start_step": 2,
        },
        "data": {
            "path": f"{folder}/data",
            "micro_batch_size": 2,
            "sequence_length": 64,
            "image_share": 0.5,
            "held_out": 0.3,
            "sources": [
                {"kind": "captions", "path": f"{folder}/images"},
                {"kind": "text", "path": f"{folder}/words.txt"},
            ],
        },
        "model": {"groups": "moe_2t2i", "dim": 32, "layers": 2, "heads": 2},
        "pretrain": {**stage, "optimizer": {"learning_rate": 1e-3, "warmup": 1}},
        "aux_router": {**stage, "steps": 2, "log_every": 1, "checkpoint_every": 1},
    }


def tiny_recipe(sources: Path, data: Path, **changes: Any) -> Recipe:
    """A recipe of seconds for `write_sources`: images of 16 codes, two layers of width 16."""
    stage = {
        "log_every": 2,
        "compile": False,
        "optimizer": {"learning_rate": 1e-2, "warmup": 2},
    }
    values = {
        "run": str(data.parent / "run"),
        "text_tokenizer": {"vocabulary_size": 320},
        "codec": CODEC | {"codebook_size": 32},
        "codec_training": {"steps": 4, "batch_size": 8},
        "data": {
            "path": str(data),
            "micro_batch_size": 2,
            "sequence_length": 64,
            "image_share": 0.25,
            "held_out": 0.2,
            "sources": [
                {"kind": "captions", "path": str(sources)},
                {"kind": "text", "path": str(sources / "text.txt")},
            ],
        },
        "model": {"groups": "moe_2t2i", "dim": 16, "layers": 2, "heads": 2},
        "pretrain": {**stage, "steps": 8, "checkpoint_every": 4},
        "aux_router": {**stage, "steps": 6, "checkpoint_every": 2},
    }
    return check(Recipe, values, "tiny").model_copy(update=changes)


def synthetic_recipe(
    codes: int, image_share: float, sequence_length: int, **sections: Any
) -> Recipe:
    """A recipe for synthetic micro-batches of four sequences; its data does not exist.

    Args:
        codes: number of codes of an image, a square.
        image_share, sequence_length: as in `[data]`.
        sections: the other sections.
    """
    data = {
        "path": "none",
        "micro_batch_size": 4,
        "sequence_length": sequence_length,
        "image_share": image_share,
        "sources": [{"kind": "text", "path": "none"}],
    }
    values = {
        "text_tokenizer": {"vocabulary_size": 320},
        "codec": {"image_size": 16 * math.isqrt(codes), "codebook_size": 64},
        "data": data,
        **sections,
    }
    return check(Recipe, values, "small")


def set_thresholds(model: Transformer, tokens_BS: Tensor) -> None:
    """Set the thresholds of all routers to those of expert choice on one micro-batch.

    They are a little higher, since a token whose score is a threshold is selected by chance of
    rounding.
    """
    cutoff_P = torch.cat([torch.zeros(0), *model(tokens_BS).cutoffs]) + 0.0123
    model.update_cutoffs(torch.stack((cutoff_P, torch.ones_like(cutoff_P))))


def replace_weights(run: Run, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the weights of a run, whose only checkpoint then has nothing else."""
    path = checkpoints_in(run.checkpoints)[-1]
    stored, state = stored_weights(path), read_state(path)
    weights = stored.read(stored.meta_tensors)
    change(weights)
    shutil.rmtree(run.checkpoints)
    save_weights(run.checkpoints, step_of(path), Weights.from_tensors(weights), state)
    return path


class OperationCounter(TorchDispatchMode):
    """Counts the operations inside its context, by name."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.counts[str(operation)] += 1
        return operation(*arguments, **(options or {}))


def make_context(
    modality_BS: Tensor,
    document_ids_BS: Tensor,
    rotary: tuple[Tensor, Tensor],
    kernel: AttentionKernel | None = None,
) -> TokenContext:
    """The context of tokens of fp64 layers, attending within their documents."""
    segments = make_segments(document_ids_BS, modality_BS < 0)
    kernel = kernel or MaskedAttention()
    layout = kernel.layout(segments, torch.float64)
    return TokenContext(modality_BS, rotary, segments, layout, torch.float64, kernel)


def make_segments(document_ids_BS: Tensor, is_padding_BS: Tensor | None = None) -> Segments:
    """The segments of packed documents."""
    is_padding_BS = document_ids_BS < 0 if is_padding_BS is None else is_padding_BS
    id_BS = number_segments(document_ids_BS, is_padding_BS)
    return Segments(id_BS, id_BS.numel(), id_BS.shape[1])
