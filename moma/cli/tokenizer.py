"""`moma tokenizer <verb>`: text tokenizers and image codecs."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from moma.cli.arguments import (
    App,
    AsJson,
    Overrides,
    RecipeFile,
    files_and_overrides,
    load_recipe,
    readable_recipe,
    refuse_unused,
)
from moma.cli.output import key_values, notice, print_result
from moma.errors import UserError
from moma.study.tables import Table

if TYPE_CHECKING:
    from moma.data.encode.corpus import Corpus
    from moma.runs import Tokenizers
    from moma.runtime.world import World
    from moma.train.recipe import Recipe

app = App(help="Make, import and try text tokenizers and image codecs.", no_args_is_help=True)
OutFolder = Annotated[Path, Option(help="folder of the tokenizers")]


@app.command("train-text")
def train_text(
    inputs: Annotated[
        list[str],
        Argument(
            help="a recipe or UTF-8 text files, then changes such as "
            "text_tokenizer.vocabulary_size=8192 codec.codebook_size=512"
        ),
    ],
    out: OutFolder = Path("runs/tokenizers"),
) -> None:
    """Train byte-level BPE and write `tokenizer.json`, with ids of image codes and special ids."""
    if inputs[0].endswith(".toml"):
        readable_recipe(Path(inputs[0]))
    from moma.data.encode.corpus import Corpus
    from moma.runs import Tokenizers
    from moma.tokenizers.folder import is_made, make_text_tokenizer

    sources, data, seed, sections = _recipe_or_files(inputs)
    config, folder = sections.text_tokenizer, Tokenizers(out)
    if is_made(folder.text, folder, sections.codec):
        print(f"{folder.text}: exists already; the folder is complete now")
        return
    corpus = Corpus(
        sources,
        data.held_out,
        config.max_documents,
        data.max_rejected,
        seed=seed,
        part_bytes=data.part_bytes,
    )

    def texts() -> Iterator[str]:
        yield from corpus.texts()
        corpus.require_documents()  # before anything is written

    made = make_text_tokenizer(config, sections.codec, texts(), folder)
    _report_rejected(corpus)
    size = made.get_vocab_size(with_added_tokens=True)
    print(f"{folder.text}: {size} ids, learned from {corpus.documents} documents")
    if size < config.vocabulary_size:
        notice(f"the texts have too few repetitions for {config.vocabulary_size} ids")


@app.command("train-image")
def train_image(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: OutFolder = Path("runs/tokenizers"),
    as_json: AsJson = False,
) -> None:
    """Train the image codec, on one or more GPUs; an interrupted training continues."""
    from moma.runs import Tokenizers
    from moma.runtime.world import from_rank_0, join_world
    from moma.tokenizers.folder import is_made, read_metrics

    read, folder = load_recipe(recipe, overrides), Tokenizers(out)
    with join_world(read.engine.timeout) as world:
        if not from_rank_0(world, is_made, folder.codec, folder, read.codec):
            _train_codec(read, folder, world, quiet=as_json)
        if world.rank:
            return
    metrics = read_metrics(folder).model_dump()
    line = (
        f"{folder.codec}: PSNR {metrics['psnr']:.2f} dB, {metrics['codes_used']:.1%} of the codes "
        f"used, perplexity {metrics['perplexity']:.1f}"
    )
    print_result(metrics, as_json, (), [line])


def _train_codec(recipe: "Recipe", folder: "Tokenizers", world: "World", quiet: bool) -> None:
    """Train the codec on the images of a recipe, and report the images that were left out."""
    from moma.data.encode.corpus import Corpus, ReadableImages, require_training_images
    from moma.runtime.world import raise_on_all_ranks
    from moma.tokenizers.folder import make_codec

    data, training, size = recipe.data, recipe.codec_training, recipe.codec.image_size
    if training.perceptual.weights is None and world.rank == 0:
        notice("no perceptual loss; codec_training.perceptual.weights names VGG-16's weights")
    with raise_on_all_ranks(world):
        corpus = Corpus(
            data.sources,
            data.held_out,
            training.max_documents,
            data.max_rejected,
            seed=recipe.seed,
            part_bytes=data.part_bytes,
        )
        seen = ReadableImages(corpus.images(held_out=False), size, data.max_rejected)
        # The error is measured on these, or on training images if none of these can be read.
        unseen = ReadableImages(corpus.images(held_out=True), size, max_unreadable=1)
        require_training_images(seen.images, unseen.images, "add a source of images")
        measured = unseen if unseen.has_readable else ()
    if world.rank == 0:
        _report_rejected(corpus)
    make_codec(recipe.codec, training, seen, measured, folder, recipe.seed, world, quiet)
    for reason in (*seen.unreadable.values(), *unseen.unreadable.values()):
        notice(f"an image was left out: {reason}")


@app.command("import-chameleon")
def import_chameleon(
    tokenizer: Annotated[Path, Argument(help="Chameleon's tokenizer file")],
    weights: Annotated[Path, Argument(help="image weights: a file, or a folder of the port")],
    out: OutFolder = Path("runs/tokenizers"),
    image_size: Annotated[
        int | None, Option(min=1, max=2**13, help="side of an image [that of the weights]")
    ] = None,
) -> None:
    """Make a folder of tokenizers from Chameleon's own files."""
    from moma.hub.chameleon_codec import load_chameleon_codec
    from moma.runs import Tokenizers
    from moma.tokenizers.folder import import_tokenizers

    codec = load_chameleon_codec(weights, image_size)
    vocabulary = import_tokenizers(tokenizer, codec, Tokenizers(out))
    print(f"{out}: {vocabulary.size} ids, {len(vocabulary.image_codes)} of them image codes")


@app.command()
def show(
    ctx: Context,
    folder: Annotated[Path, Argument(help="a run, prepared data, or a tokenizers' folder")],
    image: Annotated[Path | None, Option(help="an image to encode and decode")] = None,
    text: Annotated[str | None, Option(help="a text to encode and decode")] = None,
    out: Annotated[Path, Option(help="PNG file for --image and its reconstruction")] = Path(
        "reconstruction.png"
    ),
    as_json: AsJson = False,
) -> None:
    """Encode an image or a text, and show the ids and what they decode to."""
    if (image is None) == (text is None):
        raise UserError("give either --image or --text")
    if image is None:
        refuse_unused(ctx, "without --image", "out")
    if image is not None:
        result = _show_image(folder, image, out)
        table = key_values(folder, result)
    else:
        result = _show_text(folder, os.fsencode(text or ""))
        rows = [(str(i), piece) for i, piece in zip(result["ids"], result["pieces"], strict=True)]
        rows.append(("decoded", "exactly" if result["exact"] else result["text"]))
        table = Table(str(folder), "", (), rows)
    print_result(result, as_json, [table])


def _show_image(folder: Path, image: Path, out: Path) -> dict[str, Any]:
    from moma.data.outputs import require_replaceable, write_output
    from moma.images import png_bytes, read_image
    from moma.runs import Tokenizers
    from moma.runtime.world import local_device
    from moma.tokenizers.image.codec import ImageCodec, preprocess, to_pil
    from moma.tokenizers.image.metrics import image_grid, signal_to_noise

    require_replaceable(out)
    codec = ImageCodec.load(Tokenizers(folder).require().codec).to(local_device())
    opened = read_image(image, "--image", "choose another")
    original_3HW = preprocess(opened, codec.config.image_size)
    codes_BL = codec.encode(original_3HW[None].to(local_device()))
    reconstruction_3HW = codec.decode(codes_BL)[0].cpu()
    sheet = image_grid([[to_pil(original_3HW), to_pil(reconstruction_3HW)]])
    write_output(out, png_bytes(sheet))
    squared = (reconstruction_3HW - original_3HW).square().sum().item()
    return {
        "image": str(out),
        "codes": codes_BL.numel(),
        "distinct_codes": codes_BL.unique().numel(),
        "psnr": round(signal_to_noise(squared, original_3HW.numel()), 3),
    }


def _show_text(folder: Path, data: bytes) -> dict[str, Any]:
    from moma.runs import Tokenizers
    from moma.tokenizers.text import decode_bytes, decode_each, encode_bytes, load_text_tokenizer

    tokenizer = load_text_tokenizer(Tokenizers(folder).require().text)
    ids = encode_bytes(tokenizer, data)
    decoded = decode_bytes(tokenizer, ids)
    pieces = [piece.decode("utf-8", "backslashreplace") for piece in decode_each(tokenizer, ids)]
    text = decoded.decode("utf-8", "backslashreplace")
    return {"ids": ids, "pieces": pieces, "text": text, "exact": decoded == data}


def _recipe_or_files(inputs: list[str]) -> tuple[Sequence[Any], Any, int, Any]:
    """Sources, how they are read, the seed, and the sections of tokenizer and codec."""
    from pydantic import Field

    from moma.data.sources.parts import PART_BYTES
    from moma.data.sources.text import TextConfig
    from moma.recipe import Config, check, override
    from moma.tokenizers.image.codec import CodecConfig
    from moma.tokenizers.text import TextTokenizerConfig

    class Reading(Config):
        max_rejected: float = Field(default=0.01, ge=0, le=1)
        held_out: float = Field(default=0, ge=0, lt=1)
        part_bytes: int = Field(default=PART_BYTES, ge=1)

    class Sections(Config):
        text_tokenizer: TextTokenizerConfig = TextTokenizerConfig()
        codec: CodecConfig = CodecConfig()
        data: Reading = Reading()

    files, changes = files_and_overrides(inputs)
    if not files:
        raise UserError("name a recipe or text files before the changes")
    if inputs[0].endswith(".toml"):
        recipe = load_recipe(files[0], inputs[1:])
        return recipe.data.sources, recipe.data, recipe.seed, recipe
    sections = check(Sections, override({}, changes), "the command line")
    # Each source needs a name of its own; that of a single file is the default.
    names = ["text", *(f"text-{number}" for number in range(2, len(files) + 1))]
    sources = [TextConfig(path=file, name=name) for file, name in zip(files, names, strict=True)]
    return sources, sections.data, 0, sections


def _report_rejected(corpus: "Corpus") -> None:
    if corpus.first_rejected is not None:
        first = corpus.first_rejected.message
        notice(f"{corpus.rejected_counts.total()} documents were left out; the first: {first}")
