"""The model card of an exported run: what it is, what was measured, how it was trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moma.errors import UserError
from moma.recipe import to_toml
from moma.runs import Run
from moma.runtime.weights import read_json_object
from moma.train.recipe import Recipe
from moma.vocabulary import Vocabulary

_TEXT = """\
---
library_name: moma
pipeline_tag: any-to-any
tags: [moma, mixture-of-experts, mixed-modal]
---
# {name}

A mixed-modal language model with modality-aware sparsity (MoMa, arXiv 2407.21770): it reads and
generates text and images.

```python
import moma.hub.auto  # registers the model with transformers
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("{address}")
processor = AutoProcessor.from_pretrained("{address}")
answer = model.generate(**processor(text="a red"), mode="mixed")
processor.decode(answer[0])  # text and images
```

{download}`moma import {name} runs/{name}` makes it a run.

## Model

{model}

## Measured

{measured}

## Recipe

```toml
{recipe}
```
"""


def model_card(
    name: str,
    repo: str | None,
    run: Run,
    recipe: Recipe,
    vocabulary: Vocabulary,
    parameters: int,
    results: Mapping[str, Any],
) -> str:
    """The card as Markdown, with the run's last log record and held-out losses.

    Args:
        repo: its name on the Hub, if it has one.
        run: its log is read, if there is one.
        results: further measures; see `read_results`.
    """
    config = recipe.model
    groups = ", ".join(
        f"{'/'.join(each.modalities)} × {each.experts}" for each in config.group_list
    )
    model = {
        "experts": groups,
        "layers": config.layers,
        "layers with mixture-of-depths": len(config.depth_layers),
        "width": config.dim,
        "parameters": f"{parameters:,}",
        "ids": f"{vocabulary.size:,}",
        "codes of an image": f"{vocabulary.codes_per_image:,}",
        "context": f"{recipe.data.sequence_length:,}",
    }
    measured = {**_of_log(run), **results}
    return _TEXT.format(
        name=name,
        address=repo or name,
        download=f"After `hf download {repo} --local-dir {name}`, " if repo else "",
        model=_table(model),
        measured=_table(measured) if measured else "This run has no log.",
        recipe=to_toml(recipe).strip(),
    )


def read_results(files: Sequence[Path]) -> dict[str, Any]:
    """The measures in files of JSON by `moma evaluate`, by names for the card.

    Raises:
        UserError: a file has something else.
    """
    measures: dict[str, Any] = {}
    for file in files:
        values = read_json_object(file)
        try:
            found = _of_suite(values) if "suite" in values else values
            measures |= {f"{file.stem}: {name}": _text(value) for name, value in found.items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: has no results; give what `moma evaluate --json` prints"
            ) from error
    return measures


def _of_suite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{values['suite']}, {values['routing']} routing, {source}: {name}": value
        for source, row in values["sources"].items()
        for name, value in row.items()
    }


def _text(value: Any) -> str | None:
    """A measure, with its interval if it has one."""
    if value is None:
        return None
    if not isinstance(value, dict):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    if value["value"] is None or value["low"] is None:
        return _text(value["value"])
    return f"{value['value']:,.4g} ({value['low']:,.4g} – {value['high']:,.4g})"


def _of_log(run: Run) -> dict[str, Any]:
    records = run.read_metrics() if run.metrics.is_file() else []
    if not records:
        return {}
    last = records[-1]
    values = {str(key): last[key] for key in ("step", "tokens", "flops") if key in last}
    values |= {f"training: {key}": last[key] for key in last if key.startswith("loss")}
    for held_out in [each for each in records if each.get("validation")][-1:]:
        values["step of the held-out losses"] = held_out["step"]
        for routing, losses in held_out["validation"].items():
            values |= {f"held-out, {routing} routing: {key}": losses[key] for key in losses}
    return values


def _table(values: Mapping[str, Any]) -> str:
    rows = [
        f"| {key} | {value:,.4g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in values.items()
        if value is not None
    ]
    return "\n".join(["| | |", "|---|---|", *rows])
