"""`moma generate`: continue text and images."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Context, Option

from moma.cli.arguments import (
    COUNT_LIMIT,
    App,
    CausalRouting,
    RunFolder,
    in_order,
    read_parts,
    refuse_unused,
)
from moma.cli.output import notice
from moma.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from moma.generate.grammar import Mode
    from moma.generate.guidance import Guidance
    from moma.generate.mixed import MixedModel
    from moma.generate.settings import Settings

app = App()

Prompts = Annotated[list[str] | None, Option(help="text to continue; may be repeated")]
Images = Annotated[
    list[Path] | None, Option(help="image to continue; may be repeated, mixed with --prompt")
]
ModeName = Annotated[Literal["text", "image", "mixed"], Option(help="what to generate")]
From = Annotated[
    Path | None, Option("--from", help="instead of --prompt and --image: a .jsonl file of prompts")
]
Out = Annotated[Path, Option(help="folder for images; with --from, a new one for all answers")]
Seed = Annotated[int, Option(min=0, max=2**32 - 1, help="random seed; no effect at temperature 0")]
Temperature = Annotated[float, Option(help="0: greedy")]
TopP = Annotated[
    float, Option(help="sample from the smallest set of tokens with this much probability")
]
TopK = Annotated[int, Option(min=0, help="sample from this many most likely tokens; 0: all")]
MinP = Annotated[
    float,
    Option(min=0, max=1, help="sample from tokens with this fraction of the highest probability"),
]
RepetitionPenalty = Annotated[
    float, Option(help="lowers the logits of text tokens that occurred before; 1: off")
]
Stop = Annotated[list[str] | None, Option(help="text that ends the answer; may be repeated")]
ImageCount = Annotated[int, Option(min=1, help="number of images, with --mode image")]
Samples = Annotated[int, Option(min=1, max=1024, help="number of answers, with successive seeds")]
TextGuidance = Annotated[
    float | None, Option(help="classifier-free guidance by text, such as 3; with --mode image")
]
ImageGuidance = Annotated[float | None, Option(help="the same by the prompt's images, such as 1.2")]
Drafts = Annotated[
    int | None,
    Option(
        min=0,
        max=1024,
        help="draft image codes per forward pass; changes only the speed (8; 0 with guidance, "
        "while several answers are generated, and of a model with routers on a CPU)",
    ),
]
BatchSize = Annotated[
    int, Option(min=1, max=COUNT_LIMIT, help="prompts of --from that are generated together")
]


@app.command()
def generate(
    ctx: Context,
    run: RunFolder,
    prompt: Prompts = None,
    image: Images = None,
    mode: ModeName = "mixed",
    from_: From = None,
    out: Out = Path("."),
    seed: Seed = 0,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    images: ImageCount = 1,
    samples: Samples = 1,
    text_guidance: TextGuidance = None,
    image_guidance: ImageGuidance = None,
    drafts: Drafts = None,
    routing: CausalRouting = "causal",
    batch: BatchSize = 8,
) -> None:
    """Continue a prompt with text and images. Text is printed, images are written as PNG files."""
    parts = [part for part in in_order(ctx, prompt=prompt or (), image=image or ()) if part]
    _check_options(ctx, mode, from_, out, parts)
    import moma
    from moma.generate.sampling import Sampling
    from moma.generate.settings import Settings

    settings = Settings(
        mode,
        Sampling(temperature, top_p, seed, top_k, min_p, repetition_penalty),
        images=images,
        guidance=_guidance(text_guidance, image_guidance),
        stop=stop or (),
        drafts=drafts,
    )
    model = moma.load(run, routing)
    if from_ is not None:
        _answer_file(run, model, from_, out, settings, batch)
    else:
        _answer_prompt(model, parts, samples, settings, out)


def _guidance(text: float | None, image: float | None) -> "Guidance | None":
    """Guidance with the scales that are given; None without any."""
    from moma.generate.guidance import Guidance

    if text is None and image is None:
        return None
    return Guidance(1.0 if text is None else text, 1.0 if image is None else image)


def _answer_prompt(
    model: "MixedModel", parts: Sequence[str | Path], samples: int, settings: "Settings", out: Path
) -> None:
    """Print the text of the answers, and write their images."""
    content = read_parts(parts)
    numbers = count(1)
    for answer in model.generate([content] * samples, settings):
        if not answer:
            notice("the model ended the document at once")
        for part in answer:
            print(part if isinstance(part, str) else _save(part, out, numbers))


def _check_options(
    ctx: Context, mode: "Mode", from_: Path | None, out: Path, parts: Sequence[object]
) -> None:
    """Refuse options that have no effect beside the others, and an output that is no folder."""
    if from_ is not None:
        refuse_unused(ctx, "with --from", "prompt", "image", "samples")
        if out == Path("."):
            raise UserError("--from needs --out: a new folder for results.jsonl and images")
    elif not parts:
        raise UserError("nothing to continue: give --prompt, --image or both, or --from")
    else:
        refuse_unused(ctx, "without --from", "batch")
    if mode == "text":
        unused = ["drafts"] if from_ else ["out", "drafts"]
        refuse_unused(ctx, "with --mode text, which writes no images", *unused)
    if mode != "image":
        names = ("images", "text_guidance", "image_guidance")
        refuse_unused(ctx, f"with --mode {mode}; it needs --mode image", *names)
    else:
        refuse_unused(ctx, "with --mode image, which writes no text", "stop", "repetition_penalty")
    if from_ is None and all(isinstance(part, str) for part in parts):
        refuse_unused(ctx, "without an image in the prompt", "image_guidance")
    if from_ is None and not any(isinstance(part, str) for part in parts):
        refuse_unused(ctx, "without text in the prompt", "text_guidance")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is not a folder; name another")


def _answer_file(
    run: Path,
    model: "MixedModel",
    prompts: Path,
    out: Path,
    settings: "Settings",
    batch: int,
) -> None:
    """Answer the prompts of a file, those of this rank under `torchrun`."""
    from moma.generate.queue import answer_prompts, read_prompts
    from moma.runs import Run
    from moma.train.restore import run_to_load

    loaded = run_to_load(Run(run))
    guidance = settings.guidance
    recorded = {
        "run": str(run.resolve()),
        "checkpoint": f"{loaded.run.path.name}/{loaded.checkpoint.name}",
        "routing": model.model.routing_fingerprint(),
        "mode": settings.mode,
        "sampling": asdict(settings.sampling),
        "images": settings.images,
        "guidance": guidance and asdict(guidance),
        "stop": list(settings.stop),
    }
    found = read_prompts(
        prompts, lambda prompt: model.require_space(prompt, settings.mode, settings.images)
    )
    rank, ranks = (int(os.environ.get(name) or n) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    if answer_prompts(
        found,
        out,
        recorded,
        lambda queue: model.answer(queue, batch, settings),
        rank,
        ranks,
        quiet=rank > 0,
    ):
        print(out / "results.jsonl")


def _save(image: "Image.Image", folder: Path, numbers: Iterator[int]) -> Path:
    """Save under the next number whose name is free; existing files are never overwritten."""
    from moma.data.outputs import mark_output
    from moma.files import add_path_to_errors

    path = next(path for n in numbers if not os.path.lexists(path := folder / f"image_{n}.png"))
    mark_output(folder, path.name)
    try:
        with add_path_to_errors(path), path.open("xb") as file:
            image.save(file, "PNG")
    except FileExistsError:  # another process was faster
        return _save(image, folder, numbers)
    return path
