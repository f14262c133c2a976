"""Import Chameleon's weights as a dense run, and export a dense run as Chameleon.

    folder (config.json, safetensors, tokenizer.json) → `import_chameleon` → run
    run → `export_chameleon` → folder, which `ChameleonForConditionalGeneration` loads

Weights are copied file by file; no model is built and nothing is unpickled.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moma.data.outputs import mark_output
from moma.errors import UserError, list_names
from moma.hub.chameleon_codec import load_chameleon_codec, original_layout
from moma.hub.chameleon_format import (
    IMAGE_PREFIX,
    PortConfig,
    chameleon_names,
    different_text_id,
    model_config,
    port_config,
    port_names,
    read_port_config,
    rename_tokens,
    require_expressible,
    small_vq_config,
    vq_config,
)
from moma.hub.folder import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    create_run,
    new_folder,
    write_json,
)
from moma.model.architecture import ModelConfig
from moma.model.transformer import Transformer
from moma.runs import Run, Tokenizers
from moma.runtime.checkpoint import matching_weights
from moma.runtime.weights import (
    FILE_BYTES,
    Weights,
    open_weights,
    require_match,
    unused_weight_files,
    write_weights,
)
from moma.tokenizers.folder import import_tokenizers
from moma.tokenizers.image.codec import ImageCodec, read_codec_config
from moma.tokenizers.names import read_vocabulary
from moma.tokenizers.text import load_text_tokenizer
from moma.train.recipe import Recipe
from moma.train.restore import newest_checkpoint, read_run_recipe
from moma.vocabulary import MODALITIES, Vocabulary


def import_chameleon(
    folder: Path,
    run: Run,
    tokenizers: Tokenizers | None = None,
    recipe: Recipe | None = None,
    file_bytes: int = FILE_BYTES,
) -> list[str]:
    """Create a run from a folder of the `transformers` port.

    Args:
        folder: contains `config.json`, safetensors weights (see `open_weights`) and, unless
            `tokenizers` is given, `tokenizer.json`.
        tokenizers: tokenizer and codec to use instead of the folder's.
        recipe: recipe of the run, except for its model; by default its data is a text file in the
            run folder.

    Returns:
        Notes on what the run lacks and on files that were not read.

    Raises:
        UserError: the folder does not contain such a model, or the run exists already.
    """
    port = read_port_config(folder)
    vocabulary = _vocabulary(port, folder)
    config = model_config(port, str(folder / CONFIG_FILE))
    weights = _model_weights(folder, config, vocabulary)
    with new_folder(run.path) as partial:
        notes = _add_tokenizers(folder, tokenizers, port, vocabulary, Tokenizers(partial))
        context = port.max_position_embeddings
        create_run(partial, run, recipe, config, context, weights, vocabulary, file_bytes)
    if unnamed := vocabulary.size - 1 - max(port.vocabulary_map.values()):
        notes.append(
            f"the embeddings end with {unnamed} ids without a name: data that `moma prepare` "
            "encodes with this tokenizer has another vocabulary and cannot be used with the run"
        )
    if port.attention_dropout:
        notes.append(
            "attention_dropout is not imported: model.dropout applies to the outputs of layers, "
            "not inside attention"
        )
    if unused := unused_weight_files(folder):
        notes.append(f"not read, because they are no files of the model: {list_names(unused, 3)}")
    return notes


def export_chameleon(run: Run, folder: Path, file_bytes: int = FILE_BYTES) -> list[str]:
    """Write a dense run as a folder that `ChameleonForConditionalGeneration` loads.

    Args:
        run: its newest checkpoint is written, in the dtypes in which it is stored.

    Returns:
        Notes on what the folder lacks.

    Raises:
        UserError: Chameleon has no such architecture, the run is incomplete, or the folder exists.
    """
    recipe = read_run_recipe(run)
    require_expressible(recipe.model, str(run.recipe))
    vocabulary = Vocabulary.load(run.tokenizers.vocabulary)
    checkpoint = newest_checkpoint(run)
    with torch.device("meta"):
        model = Transformer(recipe.model, vocabulary, recipe.shares)
    weights = matching_weights(checkpoint, model).renamed(port_names(recipe.model.layers))
    dtype = weights.meta_tensors["lm_head.weight"].dtype
    images, image_config, notes = _images(run.tokenizers, vocabulary, dtype)
    with new_folder(folder) as partial:
        mark_output(folder.parent, folder.name)
        ids = _export_tokenizer(run.tokenizers, vocabulary, bool(images), partial, notes)
        context, dtype_name = recipe.data.sequence_length, str(dtype).removeprefix("torch.")
        values = port_config(recipe.model, vocabulary, ids, context, dtype_name, image_config)
        write_json(partial / CONFIG_FILE, values)
        write_weights(weights | Weights.from_tensors(images), partial, file_bytes)
    return notes


def _vocabulary(port: PortConfig, folder: Path) -> Vocabulary:
    """The vocabulary by the names in `config.json`; there may be more embeddings than names."""
    try:
        named = read_vocabulary(port.vocabulary_map, port.vq_config.codes_per_image)
    except UserError as error:
        raise UserError(f"{folder / CONFIG_FILE}: vocabulary_map: {error}") from error
    if named.size > port.vocab_size:
        raise UserError(
            f"{folder / CONFIG_FILE}: vocabulary_map has the id {named.size - 1}, "
            f"but vocab_size is {port.vocab_size}; get a complete copy of the folder"
        )
    return replace(named, size=port.vocab_size)


def _model_weights(folder: Path, config: ModelConfig, vocabulary: Vocabulary) -> Weights:
    """The weights of the language model under our names, checked against its shape."""
    stored, names = open_weights(folder), port_names(config.layers)
    shares = [1 / len(MODALITIES)] * len(MODALITIES)
    with torch.device("meta"):
        model = Transformer(config, vocabulary, shares).state_dict()
    found = stored.meta_tensors
    theirs = {name: found[name] for name in found if not name.startswith(IMAGE_PREFIX)}
    expected = {names[name]: tensor for name, tensor in model.items()}
    require_match(theirs, expected, f"{folder}: the weights do not match {CONFIG_FILE}")
    return stored.renamed({theirs: ours for ours, theirs in names.items()})


def _add_tokenizers(
    folder: Path,
    given: Tokenizers | None,
    port: PortConfig,
    vocabulary: Vocabulary,
    target: Tokenizers,
) -> list[str]:
    """Copy or convert tokenizer and codec, if there are any, and write the vocabulary."""
    if given is None and not (folder / TOKENIZER_FILE).is_file():
        vocabulary.save(target.vocabulary)
        return [
            f"{folder} has no {TOKENIZER_FILE}, so the run takes token ids only; "
            "give --tokenizers to read text and images"
        ]
    if given is None:
        own = import_tokenizers(folder, load_chameleon_codec(folder), target)
    else:
        own = Vocabulary.load(given.vocabulary)
        given.copy_to(target)
    differences = replace(own, size=vocabulary.size).differences(vocabulary)
    ids = load_text_tokenizer(target.text).get_vocab(with_added_tokens=True)
    if not differences and (name := different_text_id(ids, port.vocabulary_map)):
        differences = f"{name!r} is {ids[name]} there and {port.vocabulary_map[name]} here"
    if differences:
        raise UserError(
            f"{folder if given is None else given.path}: the tokenizer has another vocabulary than "
            f"{folder / CONFIG_FILE}: {differences}; give the tokenizers of this model"
        )
    vocabulary.save(target.vocabulary)
    if read_codec_config(target.codec).decoder:
        return []
    return [
        "the image weights have no decoder, as always in this format: the run reads images and "
        "writes text; give --tokenizers with a decoder to generate images"
    ]


def _images(
    tokenizers: Tokenizers, vocabulary: Vocabulary, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Image weights by the port's names, its `vq_config`, and notes on what is missing."""
    lost = "the folder has no image weights, so it takes token ids only"
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
    # The codec is stored in float32; values that fit a smaller dtype are exported in it.
    if all(torch.equal(value.to(dtype).float(), value) for value in weights.values()):
        weights = {name: value.to(dtype) for name, value in weights.items()}
    notes = ["this format has no image decoder; it stays in the run"]
    return weights, config, notes if codec.config.decoder else []


def _export_tokenizer(
    tokenizers: Tokenizers, vocabulary: Vocabulary, images: bool, folder: Path, notes: list[str]
) -> dict[str, int]:
    """Write the tokenizer with Chameleon's names; returns the id of each name."""
    ids: dict[str, int] = {}
    if tokenizers.text.is_file():
        ids = load_text_tokenizer(tokenizers.text).get_vocab(with_added_tokens=True)
    else:
        notes.append(f"{tokenizers.text} is missing; the folder has no tokenizer")
    names = chameleon_names(ids, vocabulary)
    if ids:
        text = rename_tokens(tokenizers.text.read_text(encoding="utf-8"), names)
        (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        values = {"tokenizer_class": "PreTrainedTokenizerFast"} | special
        write_json(folder / "tokenizer_config.json", values)
    renamed = {name: id_ for id_, name in names.items()}
    renamed |= {names.get(id_, name): id_ for name, id_ in ids.items()}
    if not images:
        renamed.pop("<image>", None)  # the port then refuses a prompt with an image
    return renamed
