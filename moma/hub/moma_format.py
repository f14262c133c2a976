"""moma's own format: a run as a folder to publish, and such a folder as a run.

    config.json             the recipe, with the model, and the vocabulary
    model.safetensors       weights and thresholds, or several files and their index
    tokenizer.json, codec/  the tokenizers
    generation_config.json  defaults of generation
    README.md               the model card

`moma.hub.auto` loads the folder with `transformers`. Nothing is unpickled.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import ConfigDict, field_validator

from moma.data.outputs import mark_output
from moma.errors import UserError, error_reason
from moma.generate.sampling import Sampling
from moma.hub.card import model_card, read_results
from moma.hub.folder import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    create_run,
    new_folder,
    read_config,
    write_json,
)
from moma.model.routing import ROUTINGS, CausalName
from moma.model.transformer import Transformer
from moma.recipe import Config, check
from moma.runs import Run, Tokenizers
from moma.runtime.checkpoint import matching_weights
from moma.runtime.weights import (
    FILE_BYTES,
    Weights,
    open_weights,
    require_match,
    write_weights,
)
from moma.tokenizers.folder import read_metrics
from moma.tokenizers.image.codec import CODEC_FILES, ImageCodec
from moma.tokenizers.text import load_text_tokenizer, vocabulary_of
from moma.train.recipe import Recipe
from moma.train.restore import (
    LoadedRun,
    read_run_recipe,
    require_routing,
    require_vocabulary,
    run_to_load,
)
from moma.train.thresholds import read_thresholds
from moma.vocabulary import Vocabulary

MODEL_TYPE = "moma"
PREFIX = "model."  # of the weights' names, as in checkpoints
_EMBEDDING, _HEAD = "embedding.weight", "head.weight"
_MAX_LAYERS, _MAX_WIDTH = 2**10, 2**20


class HubConfig(Config):
    """What moma reads of its `config.json`; other keys are for `transformers`.

    Attributes:
        recipe: the recipe of the run.
        vocabulary: the fields of `Vocabulary`.
        causal_routing: how the model is used causally.
        auxiliary_routers: whether the auxiliary routers are trained.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: Literal["moma"]
    recipe: Recipe
    vocabulary: dict[str, Any]
    causal_routing: CausalName = "threshold"
    auxiliary_routers: bool = False

    @field_validator("recipe", mode="before")
    @classmethod
    def _limit(cls, recipe: Any) -> Any:
        """Refuse sizes that would take all memory before the weights are compared with them."""
        model = recipe.get("model") if isinstance(recipe, dict) else None
        limits = {"layers": _MAX_LAYERS, "dim": _MAX_WIDTH, "hidden": _MAX_WIDTH}
        values = model if isinstance(model, dict) else {}
        for key, limit in limits.items():
            if isinstance(value := values.get(key), int) and value > limit:
                raise ValueError(f"model.{key} {value}: must be at most {limit}")
        return recipe


def parse_config(values: dict[str, Any], where: str) -> tuple[HubConfig, Vocabulary]:
    """The content of a `config.json`, and its vocabulary.

    Raises:
        UserError: it does not describe a model of moma; the message begins with `where`.
    """
    config = check(HubConfig, values, where)
    try:
        fields = {**config.vocabulary, "image_codes": tuple(config.vocabulary["image_codes"])}
        return config, Vocabulary(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{where}: not a vocabulary ({error_reason(error)}); get a complete copy"
        ) from error


def export_moma(
    run: Run,
    folder: Path,
    file_bytes: int = FILE_BYTES,
    repo: str | None = None,
    results: Sequence[Path] = (),
) -> list[str]:
    """Write a run as a folder that `transformers` loads after `import moma.hub.auto`.

    Args:
        run: its newest checkpoint is written, in the dtypes in which it is stored, with the
            thresholds of `moma calibrate` and trained auxiliary routers, if there are any.
        repo: its name on the Hub, if it has one.
        results: files of JSON by `moma evaluate`, whose measures the model card has, too.

    Returns:
        Notes on what the folder lacks.

    Raises:
        UserError: the run is incomplete or cannot be used causally, the folder exists, or a file
            has no results.
    """
    measures, loaded = read_results(results), run_to_load(run)
    recipe, tokenizers = read_run_recipe(loaded.run), loaded.run.require_tokenizers()
    vocabulary = Vocabulary.load(tokenizers.vocabulary)
    require_vocabulary(loaded.checkpoint, vocabulary, run.path)
    model, weights = _checkpoint_weights(run, loaded, recipe, vocabulary)
    with new_folder(folder) as partial:
        mark_output(folder.parent, folder.name)
        named = {name: PREFIX + name for name in weights.meta_tensors}
        write_weights(weights.renamed(named), partial, file_bytes)
        dtype = weights.meta_tensors[_EMBEDDING].dtype
        write_json(partial / CONFIG_FILE, _config(recipe, model, dtype))
        write_json(partial / "generation_config.json", _generation_config(vocabulary))
        _copy_tokenizers(tokenizers, partial)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        card = model_card(folder.name, repo, run, recipe, vocabulary, parameters, measures)
        (partial / "README.md").write_text(card, encoding="utf-8")
    lacks = [part for part in (tokenizers.text, tokenizers.codec) if not part.exists()]
    return [f"{part} is missing, and so is it in the folder" for part in lacks]


def import_moma(
    folder: Path, run: Run, recipe: Recipe | None = None, file_bytes: int = FILE_BYTES
) -> list[str]:
    """Create a run from a folder that `export_moma` wrote.

    Args:
        run: the new run; it has only weights.
        recipe: recipe of the run, except for its model; by default the folder's.

    Returns:
        Notes on what the run lacks.

    Raises:
        UserError: the folder does not contain such a model, or the run exists already.
    """
    config, vocabulary = parse_config(read_config(folder), str(folder / CONFIG_FILE))
    weights = _folder_weights(folder, config, vocabulary)
    with new_folder(run.path) as partial:
        notes = _add_tokenizers(Tokenizers(folder), vocabulary, Tokenizers(partial))
        own = config.recipe
        create_run(
            partial,
            run,
            recipe or own,
            own.model,
            own.data.sequence_length,
            weights,
            vocabulary,
            file_bytes,
            config.auxiliary_routers,
        )
    return notes


def _folder_weights(folder: Path, config: HubConfig, vocabulary: Vocabulary) -> Weights:
    """The weights of a folder under their names in the model, checked against its shape."""
    stored, recipe = open_weights(folder), config.recipe
    try:
        with torch.device("meta"):
            model = Transformer(recipe.model, vocabulary, recipe.shares).state_dict()
    except (RuntimeError, MemoryError) as error:
        message = f"{folder / CONFIG_FILE}: the model is too large ({error_reason(error)})"
        raise UserError(f"{message}; get a complete copy") from error
    embedding, head = PREFIX + _EMBEDDING, PREFIX + _HEAD
    if recipe.model.tied_embeddings and {embedding, head} - stored.meta_tensors.keys() == {head}:
        # As `transformers` saves it.
        stored |= Weights.from_tensors({head: stored.read([embedding])[embedding]})
    expected = {PREFIX + name: tensor for name, tensor in model.items()}
    require_match(
        stored.meta_tensors,
        expected,
        f"{folder}: the weights do not match {CONFIG_FILE}",
        "get a complete copy, or export the run again with this version of moma",
    )
    return stored.renamed({name: name.removeprefix(PREFIX) for name in expected})


def _checkpoint_weights(
    run: Run, loaded: LoadedRun, recipe: Recipe, vocabulary: Vocabulary
) -> tuple[Transformer, Weights]:
    """A run's model on the meta device, except for its thresholds, and its weights."""
    with torch.device("meta"):
        model = Transformer(recipe.model, vocabulary, recipe.shares)
    stored = matching_weights(loaded.checkpoint, model)
    expected = model.state_dict()
    # Buffers that are not stored are zero, as in a new model.
    cutoffs = {
        name: torch.zeros_like(expected[name], device="cpu")
        for name in expected.keys() - stored.meta_tensors.keys()
    }
    cutoffs |= stored.read(
        name for name in stored.meta_tensors if name.endswith(".cutoff_means_3E")
    )
    cutoffs |= read_thresholds(run, loaded.checkpoint, model)
    others = {name: name for name in stored.meta_tensors if name not in cutoffs}
    weights = stored.renamed(others) | Weights.from_tensors(cutoffs)
    model.load_state_dict(cutoffs, strict=False, assign=True)
    model.has_auxiliary = loaded.has_auxiliary
    if loaded.has_auxiliary and not model.has_thresholds:
        model.causal_routing = ROUTINGS["auxiliary"]
    require_routing(run, model)
    return model, weights


def _config(recipe: Recipe, model: Transformer, dtype: torch.dtype) -> dict[str, Any]:
    vocabulary, config = model.vocabulary, recipe.model
    return {
        "architectures": ["MomaForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocabulary.size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": recipe.data.sequence_length,
        "tie_word_embeddings": config.tied_embeddings,
        "causal_routing": next(
            name for name in get_args(CausalName) if ROUTINGS[name] == model.causal_routing
        ),
        "auxiliary_routers": model.has_auxiliary,
        "recipe": recipe.model_dump(mode="json", by_alias=True, exclude_none=True),
        "vocabulary": vocabulary.to_dict(),
    }


def _generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    sampling = Sampling()
    return {
        "bos_token_id": vocabulary.beginning,
        "eos_token_id": vocabulary.end,
        "pad_token_id": vocabulary.padding,
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }


def _copy_tokenizers(source: Tokenizers, folder: Path) -> None:
    """Copy the tokenizer and the codec, as far as they exist."""
    for name in (TOKENIZER_FILE, *(f"codec/{name}" for name in (*CODEC_FILES, "metrics.json"))):
        if (source.path / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.path / name, folder / name)


def _add_tokenizers(source: Tokenizers, vocabulary: Vocabulary, target: Tokenizers) -> list[str]:
    """Copy a folder's tokenizers after they were read, and write the vocabulary."""
    notes = []
    if source.text.is_file():
        try:
            own = vocabulary_of(load_text_tokenizer(source.text), vocabulary.codes_per_image)
        except UserError as error:
            raise UserError(f"{source.text}: {error}; get a complete copy") from error
        if differences := replace(own, size=vocabulary.size).differences(vocabulary):
            raise UserError(
                f"{source.text}: has another vocabulary than {CONFIG_FILE}: {differences}; get a "
                "complete copy"
            )
    else:
        notes.append(f"{source.path} has no {TOKENIZER_FILE}, so the run takes token ids only")
    if source.codec.is_dir():
        codec = ImageCodec.load(source.codec).config
        sizes = len(vocabulary.image_codes), vocabulary.codes_per_image
        if (codec.codebook_size, codec.codes_per_image) != sizes:
            raise UserError(
                f"{source.codec}: has {codec.codebook_size} codes, {codec.codes_per_image} in an "
                f"image, but {CONFIG_FILE} has {sizes[0]} and {sizes[1]}; get a complete copy"
            )
        if (source.codec / "metrics.json").is_file():
            read_metrics(source)
    else:
        notes.append(f"{source.path} has no codec, so the run takes no images")
    _copy_tokenizers(source, target.path)
    vocabulary.save(target.vocabulary)
    return notes
