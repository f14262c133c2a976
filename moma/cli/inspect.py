"""`moma inspect`: how a run routes the tokens of a document."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Context, Option

from moma.cli.arguments import (
    App,
    AsJson,
    MovedData,
    RunFolder,
    in_order,
    read_parts,
    refuse_unused,
    with_data,
)
from moma.cli.output import notice, print_result
from moma.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from moma.data.batches.packing import Batch
    from moma.evaluate.token_routing import TokenRouting
    from moma.generate.mixed import MixedModel
    from moma.model.routing import RoutingName
    from moma.model.transformer import Transformer
    from moma.runs import Run
    from moma.train.recipe import Recipe

app = App()


Prompts = Annotated[list[str] | None, Option(help="text; may be repeated")]
Images = Annotated[list[Path] | None, Option(help="image; may be repeated, mixed with --prompt")]
DocumentNumber = Annotated[
    int | None,
    Option(min=1, max=2**62, help="instead: this document of the run's data, from 1 on"),
]
Source = Annotated[str | None, Option(help="source of --document")]
Split = Annotated[Literal["train", "held_out"], Option(help="documents that --document counts")]
OneRouting = Annotated[
    Literal["causal", "choice", "auxiliary", "threshold", "half"] | None,
    Option(help="only this one [default: causal, as in generation, and choice, as in training]"),
]
Out = Annotated[Path, Option(help="file to write: .html, or .png")]


@app.command()
def inspect(
    ctx: Context,
    run: RunFolder,
    prompt: Prompts = None,
    image: Images = None,
    document: DocumentNumber = None,
    source: Source = None,
    split: Split = "held_out",
    routing: OneRouting = None,
    data: MovedData = None,
    out: Out = Path("routing.html"),
    as_json: AsJson = False,
) -> None:
    """Draw which experts and layers process each token of a document."""
    parts = [part for part in in_order(ctx, prompt=prompt or (), image=image or ()) if part]
    if document is not None:
        refuse_unused(ctx, "with --document", "prompt", "image")
    elif parts:
        refuse_unused(ctx, "without --document", "source", "split")
    else:
        raise UserError("nothing to inspect: give --prompt, --image or both, or --document")
    from moma.data.outputs import require_replaceable
    from moma.evaluate.token_routing import as_json_value, first_tokens, route_document
    from moma.generate.mixed import MixedModel
    from moma.runs import Run
    from moma.train.restore import load_run

    require_replaceable(out)
    model, recipe = load_run(Run(run))
    recipe = with_data(recipe, data)
    mixed = MixedModel.assemble(model, Run(run).tokenizers, recipe.data.sequence_length)
    if document is None:
        name, ids = "a given document", _encode(mixed, parts)
    else:
        name, ids = _find(Run(run), recipe, source, split, document)
    read = first_tokens(ids, mixed.context, model.vocabulary)
    tokens = f"{len(ids)} tokens"
    if len(read) < len(ids):
        tokens = f"the first {len(read)} of {tokens}: a sequence has {mixed.context}"
    batches = _batches(Run(run), model, recipe, routing)
    routings = [route_document(model, read, each, batch) for each, batch in batches.items()]
    _draw(out, mixed, routings, f"Routing by {run.resolve().name}", f"{name} ({tokens})")
    described = {each.routing: as_json_value(mixed, each) for each in routings}
    result = {"run": str(run), "document": name, "page": str(out), "routings": described}
    print_result(result, as_json, (), [out])


def _encode(mixed: "MixedModel", parts: "Sequence[str | Path]") -> "np.ndarray":
    """The ids of texts and image files."""
    from numpy import array

    return array(mixed.encode(read_parts(parts)))


def _find(
    run: "Run", recipe: "Recipe", source: str | None, split: str, document: int
) -> "tuple[str, np.ndarray]":
    """The name and the ids of a document of the run's data."""
    from moma.data.inspect import find_document
    from moma.train.restore import require_training_data

    require_training_data(run, recipe)
    found = find_document(recipe.data.path, source, split, document)
    return f"{found.source}, {split}, document {document}: {found.name}", found.ids


def _draw(
    out: Path, mixed: "MixedModel", routings: "Sequence[TokenRouting]", title: str, what: str
) -> None:
    """Write a PNG if the file is named so, and otherwise a page."""
    if out.suffix.lower() == ".png":
        from moma.data.outputs import write_output
        from moma.images import png_bytes
        from moma.study.routing_plot import plot_routing

        write_output(out, png_bytes(plot_routing(mixed, routings, f"{title}: {what}"), dpi=150))
        return
    from moma.study.page import Page
    from moma.study.routing_drawing import STYLE, draw_routing

    page = Page(title, what, STYLE)
    page.add(draw_routing(mixed, routings))
    page.write(out)


def _batches(
    run: "Run", model: "Transformer", recipe: "Recipe", only: "RoutingName | None"
) -> "dict[RoutingName, Batch | None]":
    """The routings to show, each with the micro-batch to route in."""
    from moma.evaluate.token_routing import training_batch
    from moma.train.restore import require_routing

    found: dict[RoutingName, Batch | None] = {}
    names: list[RoutingName] = (
        ["causal", "choice"] if model.config.has_expert_choice else ["causal"]
    )
    for name in [only] if only else names:
        require_routing(run, model, name)
        try:
            found[name] = training_batch(recipe, model.vocabulary) if name == "choice" else None
        except UserError as error:
            if only:
                raise
            notice(f"without choice routing, which needs the run's data: {error}")
    return found
