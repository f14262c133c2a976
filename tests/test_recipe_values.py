"""Values of recipes: paths, numbers and names, and values that do not fit together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moma.data.sources.registry import source_kinds
from moma.errors import UserError
from moma.recipe import Config, read_recipe
from moma.train.recipe import Recipe
from tests.factories import write_minimal_recipe

PATH_KEYS = (
    "run",
    "from",
    "data.path",
    "data.tokenizers",
    "codec_training.perceptual.weights",
    "data.sources.1.path",
)


def types_of(annotation: Any) -> list[Any]:
    parts = getattr(annotation, "__args__", ())
    return [found for part in parts for found in types_of(part)] or [annotation]


def leaves(schema: type[Config], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a recipe, with its annotation."""
    for name, field in schema.model_fields.items():
        key = prefix + (field.alias or name)
        below = [kind for kind in types_of(field.annotation) if is_config(kind)]
        for kind in below:
            yield from leaves(kind, f"{key}.")
        if not below:
            yield key, field.annotation


def is_config(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Config)


@pytest.fixture
def recipe(tmp_path):
    return write_minimal_recipe(tmp_path)


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "is empty"),
        ("' '", "is empty"),
        ('"a\\u0000b"', "NUL character"),
        ("a\udcff", "not valid UTF-8"),
        ("[1]", "should be a path in quotes"),
        ("~no-such-user/x", "no such user"),
        ("x" * 5000, "too long"),
        ("s3://bucket/x.parquet", "is an address; copy it to this machine"),
        ("https://a.example/x.jsonl", "is an address"),
        ("file:///x.jsonl", "is an address"),
    ],
)
def test_unusable_paths_are_refused(recipe, key, value, message):
    with pytest.raises(UserError, match=rf"'{key}': .*{message}"):
        read_recipe(Recipe, recipe, [f"{key}={value}"])


@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_loop_of_links_is_refused(recipe, tmp_path, key):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=rf"'{key}': .*loop of symbolic links"):
        read_recipe(Recipe, recipe, [f"{key}={tmp_path}/loop/x"])


def test_every_path_of_the_recipe_is_checked():
    """A new key of a path has to join `PATH_KEYS` or to be below a source's `path`."""
    found = {key for key, annotation in leaves(Recipe) if Path in types_of(annotation)}
    lists = {"data.sources.clean.evaluation_files"}
    assert found == {key.replace("1.path", "path") for key in PATH_KEYS} | lists


def test_an_empty_path_in_a_list_is_refused(recipe):
    key = "data.sources.1.clean.evaluation_files"
    with pytest.raises(UserError, match=rf"'{key}\.0': is empty"):
        read_recipe(Recipe, recipe, [f'{key}=[""]'])


@pytest.mark.parametrize("kind", sorted(source_kinds()))
@pytest.mark.parametrize(
    ("path", "message"),
    [("", ""), ("s3://bucket/x.parquet", "is an address"), ("hf://datasets/a/b", "is an address")],
)
def test_an_empty_path_or_an_address_of_any_source_is_refused(recipe, kind, path, message):
    if "path" not in source_kinds()[kind].model_fields:
        pytest.skip("it reads no path")
    source = f'data.sources=[{{kind = "{kind}", path = "{path}"}}]'
    with pytest.raises(UserError, match=rf"'data\.sources\.0\.path': .*{message}"):
        read_recipe(Recipe, recipe, [source])


def test_a_leading_tilde_is_the_home_directory(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert read_recipe(Recipe, recipe, ["run=~/a"]).run == Path("/somewhere/a")
    assert read_recipe(Recipe, recipe, ["run=a~b"]).run == Path("a~b")


@pytest.mark.parametrize(
    "text", ["2024", "2024-01-05", "1e5", "0x10", "true", "inf", "12:30:00", "007", "1_000"]
)
def test_text_keys_keep_numbers_and_dates_as_written(recipe, text):
    changes = [f"run={text}", f"data.path=x/{text}", "model.groups=moe_4t4i"]
    assert read_recipe(Recipe, recipe, changes).run == Path(text)
    if ":" not in text:
        read = read_recipe(Recipe, recipe, [f"data.sources.-1.name={text}"])
        assert read.data.sources[1].name == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=99999999999999999999", "'seed': "),
        ("seed=-1", "'seed': "),
        ("seed=nan", "'seed': "),
        ("pretrain.steps=99999999999999999999", r"'pretrain\.steps': should be less than 2\*\*63"),
        ("codec.block_channels=[99999999999999999999]", "less than or equal to 16384"),
        ("codec.block_channels=[true, 64]", "block_channels should be a number, not true"),
        ('data.sources.0={kind = "html", path = "a", drop_classes = ["\\u0000"]}', "NUL"),
        ("pretrain.steps=true", "steps should be a number, not true or false"),
        ("pretrain.z_loss=false", "z_loss should be a number, not true or false"),
        ("pretrain.optimizer.learning_rate=nan", "finite"),
        ("model.rope_theta=0", r"'model\.rope_theta': .*greater than 0"),
        ("model.norm_epsilon=-1", r"'model\.norm_epsilon': .*greater than 0"),
        ("pretrain.z_loss=-1", r"'pretrain\.z_loss': .*greater than or equal to 0"),
        ("model.depth.layers=[-1]", r"'model\.depth\.layers\.0': .*greater than or equal to 0"),
        ("tracking.wandb_project=a\udcff", "not valid UTF-8"),
        ("=3", "write key=value"),
        ('data.path="unclosed', """override 'data.path="unclosed': not valid TOML"""),
        ("run='a'b", "close or correct its quotation marks"),
        (r'data.path="C:\data"', r"not valid TOML \(.*\); close or correct its quotation marks"),
        ("data.sequence_length=9000000000000000000", r"'data\.sequence_length': .*16777216"),
        ("data.micro_batch_size=9000000000000000000", r"'data\.micro_batch_size': .*16777216"),
        ("data.micro_batch_size=8388608", r"at most 16,777,216 tokens; lower"),
        ("data.prefetch=9000000000000000000", r"'data\.prefetch': .*1024"),
        ("pretrain.gradient_accumulation_steps=99999999", r"accumulation_steps': .*65536"),
        ("engine.timeout=1e300", r"'engine\.timeout': .*10000000"),
        ("text_tokenizer.vocabulary_size=99999999999", r"vocabulary_size': .*16777216"),
        ("text_tokenizer.max_documents=9000000000000000000", r"max_documents': .*1000000000"),
        ("text_tokenizer.reserved=99999999999", r"reserved': .*1048576"),
        ("codec_training.max_documents=9000000000000000000", r"max_documents': .*1000000000"),
        ("codec_training.batch_size=99999999999", r"batch_size': .*1048576"),
        ("codec_training.adversarial.width=99999999999", r"adversarial\.width': .*16384"),
        ("codec_training.adversarial.layers=99999999999", r"adversarial\.layers': .*13"),
        ("codec_training.learning_rate=1e300", r"learning_rate': .*1000000"),
        ("codec_training.adversarial.learning_rate=1e300", r"learning_rate': .*1000000"),
        ("codec.dead_code_threshold=1e300", r"dead_code_threshold': .*1000000000"),
        ("model.dim=99999999999999", r"'model\.dim': .*1048576"),
        ("model.layers=99999999999999", r"'model\.layers': .*4096"),
        ("model.hidden=99999999999999", r"'model\.hidden': .*1048576"),
        ("model.hidden_multiple=99999999999999", r"'model\.hidden_multiple': .*1048576"),
    ],
)
def test_values_out_of_range_are_refused(recipe, change, message):
    with pytest.raises(UserError, match=message):
        read_recipe(Recipe, recipe, [change])


def test_boolean_keys_accept_booleans(recipe):
    assert read_recipe(Recipe, recipe, ["pretrain.compile=false"]).pretrain.compile is False


def test_a_list_of_groups_is_accepted(recipe):
    groups = '[{modalities = ["text"], experts = 3}, {modalities = ["text", "image"], experts = 1}]'
    read = read_recipe(Recipe, recipe, [f"model.groups={groups}"])
    found = [(group.modalities, group.experts) for group in read.model.group_list]
    assert found == [(("text",), 3), (("text", "image"), 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["pretrain.log_every=3"], "checkpoint_every .1000. must be a multiple of log_every .3."),
        (["upcycle.keep_every=1500"], "keep_every .1500. must be a multiple of checkpoint_every"),
        (["stage=aux_router"], "from=RUN"),
        (["stage=upcycle"], "stage 'upcycle' needs from=RUN"),
        (["model.heads=5"], "multiple of 2 × heads"),
        (["codec.image_size=8192", "codec.block_channels=[32]"], "an image has 67,108,864 codes"),
        (["data.sources=[]"], "'data.sources'"),
        (["data.sources.1.name=captions"], "several sources are named captions"),
        (["data.sources.0.name=a/b"], "'data.sources.0.name'"),
    ],
)
def test_inconsistent_values_are_refused(recipe, changes, message):
    with pytest.raises(UserError, match=message):
        read_recipe(Recipe, recipe, changes)


@pytest.mark.parametrize(
    "change",
    ["learning_rate=-1", "warmup=-3", "clip=-1", "beta1=1.5", "epsilon=-1", "weight_decay=-1"],
)
def test_invalid_optimizer_values_are_refused(recipe, change):
    with pytest.raises(UserError, match=change.split("=")[0]):
        read_recipe(Recipe, recipe, [f"pretrain.optimizer.{change}"])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ('model.groups=[{modalities = ["text", "smell"], experts = 2}]', "modality 'smell'"),
        ('model.groups=[{modalities = ["text"], experts = 2}]', "no group takes 'image'"),
        ('model.groups=[{modalities = ["text", "text"], experts = 2}]', "each modality once"),
        ("model.groups=mod_dense", "'model.groups': 'mod_dense': no such architecture"),
        ("model.groups=moe_0t0i", r"\.toml: 'model\.groups': 'moe_0t0i': .* 1 to 65,536 experts"),
        ("model.groups=moe_0x", "1 to 65,536 experts"),
        ("model.groups=moe_08x", "'moe_08x': no such architecture"),
        ("model.groups=moe_4t04i", "'moe_4t04i': no such architecture"),
        ("model.groups=moe_99999999999t1i", "1 to 65,536 experts"),
        (f"model.groups=token_{'9' * 300}x", "1 to 65,536 experts"),
        ('model.groups=[{modalities = ["text"], experts = 65537}]', "experts': .*65536"),
        ("model.kv_heads=3", "multiple of kv_heads"),
        ("model.depth.layers=[99]", "no layer 99"),
        ("model.depth.capacity_factors=0.5", "did you mean 'capacity_factor'"),
    ],
)
def test_an_impossible_architecture_is_refused(recipe, override, named):
    with pytest.raises(UserError, match=named):
        read_recipe(Recipe, recipe, [override])


@pytest.mark.parametrize("value", ["inf", "nan", "-inf"])
def test_numbers_are_finite(recipe, value):
    with pytest.raises(UserError, match=r"'data\.sources\.0\.weight': .*finite"):
        read_recipe(Recipe, recipe, [f"data.sources.0.weight={value}"])
