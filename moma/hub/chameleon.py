"""Chameleon's weights as a dense run of ours, and a dense run as Chameleon.

    FOLDER (config.json, safetensors, tokenizer.json) → `import_chameleon` → RUN
    RUN → `export_chameleon` → FOLDER, which `ChameleonForConditionalGeneration` loads

Weights pass from file to file, some at a time; no model is built and nothing is unpickled.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moma.data.config import DataConfig
from moma.data.sources.text import TextConfig
from moma.errors import UserError
from moma.hub.chameleon_codec import import_chameleon_tokenizers, original_layout
from moma.hub.chameleon_format import (
    CONFIG_FILE,
    IMAGE_PREFIX,
    TOKENIZER_FILE,
    PortConfig,
    chameleon_spelling,
    model_config,
    port_config,
    port_names,
    read_port_config,
    require_expressible,
    respell,
    small_vq_config,
    vq_config,
)
from moma.model.architecture import ModelConfig
from moma.model.transformer import Transformer
from moma.recipe import check, write_recipe
from moma.runs import Run, Tokenizers
from moma.runtime.checkpoint import save_weights, stored_weights
from moma.runtime.weights import FILE_BYTES, Weights, open_weights, write_weights
from moma.tokenizers.image.codec import ImageCodec
from moma.tokenizers.names import read_vocabulary
from moma.tokenizers.text import load_text_tokenizer
from moma.train.recipe import Recipe, StageConfig
from moma.train.restore import newest_checkpoint, read_run_recipe
from moma.vocabulary import MODALITIES, Vocabulary

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_STEP = 1  # an imported run counts as finished after one step


def import_chameleon(
    folder: Path,
    run: Run,
    tokenizers: Tokenizers | None = None,
    recipe: Recipe | None = None,
    file_bytes: int = FILE_BYTES,
) -> list[str]:
    """Make a run from a folder of the `transformers` port.

    Args:
        folder: holds `config.json`, weights as safetensors in one or more files and, unless
            `tokenizers` is given, `tokenizer.json`.
        run: the run to make.
        tokenizers: whose tokenizer and codec the run gets in place of the folder's.
        recipe: what the run's recipe says besides its model; left out, a text file in the run
            folder is its data.
        file_bytes: as for `write_weights`.

    Returns:
        What the run lacks, a sentence each.

    Raises:
        UserError: the folder holds no such model, or there is a run already.
    """
    port = read_port_config(folder)
    vocabulary = _vocabulary(port, folder)
    config = model_config(port, str(folder / CONFIG_FILE))
    weights = _matched(open_weights(folder), config, vocabulary, folder)
    with _whole(run.path) as partial:
        target = Tokenizers(partial)
        notes = _place_tokenizers(folder, tokenizers, vocabulary, target)
        settings = _recipe(recipe, run, port, config, target)
        write_recipe(settings, Run(partial).recipe)
        state = {"step": _STEP, "vocabulary": vocabulary.fingerprint}
        save_weights(Run(partial).checkpoints, _STEP, weights, state, file_bytes)
    unnamed = vocabulary.size - 1 - max(port.vocabulary_map.values())
    if unnamed:
        notes.append(
            f"{unnamed} ids without a name end the table of embeddings: what `moma prepare` "
            "encodes by the tokenizer's names cannot be measured or trained on with it"
        )
    if port.attention_dropout:
        notes.append(
            "attention_dropout is not kept: model.dropout acts on what layers add, not inside "
            "of attention"
        )
    return notes


def export_chameleon(run: Run, folder: Path, file_bytes: int = FILE_BYTES) -> list[str]:
    """Write a dense run as a folder that `ChameleonForConditionalGeneration` loads.

    Args:
        run: its newest checkpoint is written, in the types that it is stored in.
        folder: the folder to make.
        file_bytes: as for `write_weights`.

    Returns:
        What the folder lacks, a sentence each.

    Raises:
        UserError: Chameleon has no such architecture, the run is not whole, or the folder exists.
    """
    recipe = read_run_recipe(run)
    require_expressible(recipe.model, str(run.recipe))
    vocabulary = Vocabulary.load(run.tokenizers.vocabulary)
    checkpoint = newest_checkpoint(run)
    stored = stored_weights(checkpoint)
    names = port_names(recipe.model.layers)
    if lost := sorted(names.keys() - stored.outlines.keys()):
        raise UserError(f"{checkpoint}: has no {lost[0]}; it is not of this recipe's model")
    weights = stored.renamed(names)
    dtype = weights.outlines["lm_head.weight"].dtype
    images, image_config, notes = _images(run.tokenizers, vocabulary, dtype)
    with _whole(folder) as partial:
        ids = _export_tokenizer(run.tokenizers, vocabulary, bool(images), partial, notes)
        values = port_config(
            recipe.model,
            vocabulary,
            ids,
            recipe.data.sequence_length,
            str(dtype).removeprefix("torch."),
            image_config,
        )
        _write_json(partial / CONFIG_FILE, values)
        write_weights(weights | Weights.of(images), partial, file_bytes)
    return notes


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when everything is in it."""
    if path.exists():
        raise UserError(f"{path}: is there already; choose another --out or delete it")
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _vocabulary(port: PortConfig, folder: Path) -> Vocabulary:
    """The vocabulary by the names in `config.json`; the table of embeddings may have more rows."""
    try:
        named = read_vocabulary(port.vocabulary_map, port.vq_config.codes_per_image)
    except UserError as error:
        raise UserError(f"{folder / CONFIG_FILE}: vocabulary_map: {error}") from error
    if named.size > port.vocab_size:
        raise UserError(
            f"{folder / CONFIG_FILE}: vocabulary_map has the id {named.size - 1}, "
            f"but vocab_size is {port.vocab_size}"
        )
    return replace(named, size=port.vocab_size)


def _matched(found: Weights, config: ModelConfig, vocabulary: Vocabulary, folder: Path) -> Weights:
    """The weights of the language model under our names, checked against its shape."""
    shares = [1 / len(MODALITIES)] * len(MODALITIES)
    with torch.device("meta"):
        expected = Transformer(config, vocabulary, shares).state_dict()
    names = port_names(config.layers)
    theirs = {name for name in found.outlines if not name.startswith(IMAGE_PREFIX)}
    missing, unknown = sorted({*names.values()} - theirs), sorted(theirs - {*names.values()})
    if missing or unknown:
        raise UserError(
            f"{folder}: its weights are not those of its {CONFIG_FILE} "
            f"({len(missing)} missing: {_some(missing)}; {len(unknown)} unknown: {_some(unknown)})"
        )
    weights = found.renamed({theirs: ours for ours, theirs in names.items()})
    for name, outline in weights.outlines.items():
        if outline.shape != expected[name].shape:
            raise UserError(
                f"{folder}: {names[name]} has shape {tuple(outline.shape)}; by {CONFIG_FILE} it "
                f"should be {tuple(expected[name].shape)}"
            )
        if outline.dtype not in _FLOATS:
            raise UserError(f"{folder}: {names[name]} is {outline.dtype}; use weights in floats")
    return weights


def _place_tokenizers(
    folder: Path, given: Tokenizers | None, vocabulary: Vocabulary, target: Tokenizers
) -> list[str]:
    """Put tokenizer, codec and vocabulary in place, as far as they are there."""
    if given is None and not (folder / TOKENIZER_FILE).is_file():
        vocabulary.save(target.vocabulary)
        return [
            f"{folder} has no {TOKENIZER_FILE}, so that the run takes token ids alone; "
            "give --tokenizers to read text and images"
        ]
    if given is None:
        own = import_chameleon_tokenizers(folder, folder, target)
    else:
        own = Vocabulary.load(given.vocabulary)
        given.copy_to(target)
    if differences := replace(own, size=vocabulary.size).differences(vocabulary):
        raise UserError(
            f"{folder if given is None else given.path}: the tokenizer has another vocabulary than "
            f"{folder / CONFIG_FILE}: {differences}"
        )
    vocabulary.save(target.vocabulary)
    if ImageCodec.load(target.codec).config.decoder:
        return []
    return [
        "the image weights have no decoder, as always in this format: the run reads images and "
        "writes text; give --tokenizers with a decoder to draw"
    ]


def _recipe(
    base: Recipe | None, run: Run, port: PortConfig, config: ModelConfig, tokenizers: Tokenizers
) -> Recipe:
    """The recipe of an imported run."""
    values: dict[str, Any] = {
        "data": DataConfig(
            path=run.path / "data",
            tokenizers=run.path,
            micro_batch_size=1,
            sequence_length=port.max_position_embeddings,
            image_share=0.0,
            sources=(TextConfig(path=run.path / "texts.txt"),),
        ).model_dump()
    }
    if base is not None:
        values = base.model_dump(by_alias=True)
    values |= {
        "run": run.path,
        "stage": "pretrain",
        "from": None,
        "model": config.model_dump(),
        "pretrain": StageConfig(steps=_STEP, log_every=1, checkpoint_every=1).model_dump(),
        "text_tokenizer": {"vocabulary_size": port.vocab_size},
    }
    if tokenizers.codec.exists():
        values["codec"] = ImageCodec.load(tokenizers.codec).config.model_dump()
    return check(Recipe, values, str(run.recipe))


def _images(
    tokenizers: Tokenizers, vocabulary: Vocabulary, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Image weights by the port's names, its `vq_config`, and what is lost."""
    lost = "the folder has no image weights, so that it takes token ids alone"
    if not tokenizers.codec.exists():
        return {}, small_vq_config(vocabulary), [f"{tokenizers.codec} is missing; {lost}"]
    codec = ImageCodec.load(tokenizers.codec)
    try:
        layout, config = original_layout(codec), vq_config(codec.config)
    except UserError as error:
        return {}, small_vq_config(vocabulary), [f"{error}; {lost}"]
    weights = {
        IMAGE_PREFIX + name: value.contiguous()
        for name, value in layout.items()
        if not name.startswith("decoder.")
    }
    # The codec is kept in float32; what came from a smaller type goes back to it unchanged.
    if all(torch.equal(value.to(dtype).float(), value) for value in weights.values()):
        weights = {name: value.to(dtype) for name, value in weights.items()}
    notes = ["this format has no image decoder; it stays in the run"]
    return weights, config, notes if codec.config.decoder else []


def _export_tokenizer(
    tokenizers: Tokenizers, vocabulary: Vocabulary, images: bool, folder: Path, notes: list[str]
) -> dict[str, int]:
    """Write the tokenizer in Chameleon's spelling; returns the ids by their names."""
    ids: dict[str, int] = {}
    if tokenizers.text.is_file():
        ids = load_text_tokenizer(tokenizers.text).get_vocab(with_added_tokens=True)
    else:
        notes.append(f"{tokenizers.text} is missing; the folder has no tokenizer")
    names = chameleon_spelling(ids, vocabulary)
    if ids:
        text = respell(tokenizers.text.read_text(encoding="utf-8"), names)
        (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        values = {"tokenizer_class": "PreTrainedTokenizerFast"} | special
        _write_json(folder / "tokenizer_config.json", values)
    spelled = {name: id_ for id_, name in names.items()}
    spelled |= {names.get(id_, name): id_ for name, id_ in ids.items()}
    if not images:
        spelled.pop("<image>", None)  # a prompt with an image is then refused
    return spelled


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) or "none"
