"""What all formats share: a new folder that appears when it is complete, and the run of weights."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moma.errors import UserError
from moma.files import UNFINISHED
from moma.model.architecture import ModelConfig
from moma.recipe import check
from moma.runs import Run, Tokenizers
from moma.runtime.checkpoint import save_weights
from moma.runtime.weights import Weights, read_json_object
from moma.tokenizers.image.codec import read_codec_config
from moma.train.recipe import Recipe, RouterStageConfig, StageConfig
from moma.vocabulary import Vocabulary

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
_STEP = 1  # an imported run counts as finished after one step


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `path` when it is complete."""
    if path.exists():
        raise UserError(f"{path}: exists already; choose another folder or delete it")
    partial = path.with_name(path.name + UNFINISHED)
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(
            f"{partial}: exists already; another process is writing {path.name}, or was killed; "
            "delete it, or choose another folder"
        ) from error
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
        UserError: it is missing or damaged, or the folder is a release in Meta's own layout.
    """
    path = folder / CONFIG_FILE
    pickles = [*folder.glob("consolidated*.pth"), *folder.glob("models/*/consolidated*.pth")]
    if pickles and not path.exists():
        raise UserError(
            f"{folder}: is a release in Meta's layout, and {pickles[0].name} is a pickle, which "
            "may run code; convert it to safetensors with convert_chameleon_weights_to_hf.py of "
            "transformers 4"
        )
    return read_json_object(path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def create_run(
    partial: Path,
    run: Run,
    base: Recipe | None,
    model: ModelConfig,
    context: int,
    weights: Weights,
    vocabulary: Vocabulary,
    file_bytes: int,
    auxiliary: bool = False,
) -> None:
    """Make a folder with tokenizers a run that has only weights; see `save_weights`.

    Args:
        partial: the folder, which becomes that of `run`.
        base: the recipe whose data it has; if omitted, its data is a text file in the run folder.
        context: maximum number of tokens of a sequence, unless there is a `base`.
        auxiliary: whether its auxiliary routers are trained.
    """
    tokenizers = Tokenizers(partial)
    data = {
        "path": run.path / "data",
        "tokenizers": run.path,
        "micro_batch_size": 1,
        "sequence_length": context,
        "image_share": 0.0,
        "sources": [{"kind": "text", "path": run.path / "texts.txt"}],
    }
    values = base.model_dump(by_alias=True) if base else {"data": data}
    steps: dict[str, Any] = {"steps": _STEP, "log_every": 1, "checkpoint_every": 1}
    values |= {
        "run": run.path,
        "stage": "aux_router" if auxiliary else "pretrain",
        "from": run.path if auxiliary else None,
        "model": model.model_dump(),
        "pretrain": StageConfig(**steps).model_dump(),
        "aux_router": RouterStageConfig(**steps).model_dump(),
        "text_tokenizer": {"vocabulary_size": vocabulary.size},
    }
    if tokenizers.codec.exists():
        values["codec"] = read_codec_config(tokenizers.codec).model_dump()
    made = Run(partial)
    made.create(check(Recipe, values, str(run.recipe)), tokenizers)
    state = {"step": _STEP, "vocabulary": vocabulary.fingerprint}
    save_weights(made.checkpoints, _STEP, weights, state, file_bytes)
