"""The model card of an exported run: what it is, what was measured, how it was trained."""

from collections.abc import Mapping
from typing import Any

from moma.recipe import to_toml
from moma.runs import Run
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

model = AutoModelForCausalLM.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
answer = model.generate(**processor(text="a red"), mode="mixed")
processor.decode(answer[0])  # text and images
```

`moma import {name} runs/{name}` makes it a run.

## Model

{model}

## Measured

{measured}

## Recipe

```toml
{recipe}
```
"""


def model_card(name: str, run: Run, recipe: Recipe, vocabulary: Vocabulary, parameters: int) -> str:
    """The card as Markdown, with the run's last log record and held-out losses.

    Args:
        name: name of the model.
        run: its log is read, if there is one.
        recipe: its recipe.
        vocabulary: its vocabulary.
        parameters: number of parameters.
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
    toml = to_toml(recipe).strip()
    return _TEXT.format(name=name, model=_table(model), measured=_measured(run), recipe=toml)


def _measured(run: Run) -> str:
    records = run.read_metrics() if run.metrics.is_file() else []
    if not records:
        return "This run has no log."
    last = records[-1]
    values = {f"training: {key}": last[key] for key in last if key.startswith("loss")}
    for held_out in [each for each in records if each.get("validation")][-1:]:
        values["step of the held-out losses"] = held_out["step"]
        for routing, losses in held_out["validation"].items():
            values |= {f"held-out, {routing} routing: {key}": losses[key] for key in losses}
    counters = {str(key): last[key] for key in ("step", "tokens", "flops") if key in last}
    return _table(counters | values)


def _table(values: Mapping[str, Any]) -> str:
    rows = [
        f"| {key} | {value:,.4g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in values.items()
        if value is not None
    ]
    return "\n".join(["| | |", "|---|---|", *rows])
