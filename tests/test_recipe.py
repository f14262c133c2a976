"""Recipes: reading, overriding, validating and writing them."""

import tomllib
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moma.errors import UserError
from moma.recipe import Config, check, find_recipe, override, read_recipe
from moma.train.recipe import Recipe
from tests.factories import write_minimal_recipe, write_recipe

DEMO = Path(__file__).parents[1] / "configs" / "demo.toml"


class Inner(Config):
    size: int = 1
    names: tuple[str, ...] = ()


class Outer(Config):
    title: str = ""
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = ()
    mode: Literal["a", "b"] = "a"
    maybe: float | None = None


@pytest.fixture
def recipe(tmp_path):
    return write_minimal_recipe(tmp_path)


def test_a_minimal_recipe_gets_defaults(recipe):
    read = read_recipe(Recipe, recipe)
    assert read.data.micro_batch_size == 2
    assert [source.kind for source in read.data.sources] == ["captions", "text"]
    assert read.stage == "pretrain" and read.stage_config is read.pretrain
    assert read.shares == (0.5, 0.5)


def test_the_demo_recipe_is_valid():
    read = read_recipe(Recipe, DEMO)
    assert read.model.groups == "moe_4t4i"


def test_a_configuration_cannot_be_changed(recipe):
    read = read_recipe(Recipe, recipe)
    with pytest.raises(ValidationError, match="frozen"):
        read.seed = 3  # type: ignore[misc]


def test_deeply_nested_toml_is_refused(recipe):
    with pytest.raises(UserError):
        read_recipe(Recipe, recipe, ["seed=" + "[" * 20_000])
    recipe.write_text("seed = " + "[" * 20_000)
    with pytest.raises(UserError, match="not valid TOML"):
        read_recipe(Recipe, recipe)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["seed=3"], {"seed": 3}),
        (["pretrain.steps=7"], {"pretrain.steps": 7}),
        (["pretrain.optimizer.learning_rate=2e-3"], {"pretrain.optimizer.learning_rate": 2e-3}),
        (["pretrain.compile=false"], {"pretrain.compile": False}),
        (["codec.block_channels=[32, 64]"], {"codec.block_channels": (32, 64)}),
        (["model.groups=dense"], {"model.groups": "dense"}),
        (['model.groups="dense"'], {"model.groups": "dense"}),
        ([" seed = 4 "], {"seed": 4}),
        (["seed=1", "seed=2"], {"seed": 2}),
        (["run=runs/a=b"], {"run": Path("runs/a=b")}),
        (["from=runs/a"], {"from_": Path("runs/a")}),
        (["data.sources.0.weight=2.5"], {"data.sources.0.weight": 2.5}),
        (["data.sources.-1.weight=2"], {"data.sources.1.weight": 2.0}),
        (
            ['data.sources=[{kind = "text", path = "x"}]'],
            {"data.sources.0.kind": "text", "data.sources.0.path": Path("x")},
        ),
    ],
)
def test_overrides_set_their_key(recipe, overrides, expected):
    read = read_recipe(Recipe, recipe, overrides)
    for key, value in expected.items():
        node = read
        for part in key.split("."):
            node = node[int(part)] if isinstance(node, tuple) else getattr(node, part)
        assert node == value


@pytest.mark.parametrize(
    "text",
    [
        "seed",
        "data.sources.5.weight=1",
        "data.sources.first.weight=1",
        "data.micro_batch_size.x=1",
        "a.b.c.d",
    ],
)
def test_an_override_without_a_matching_key_is_refused(recipe, text):
    with pytest.raises(UserError, match=f"override '{text}'"):
        read_recipe(Recipe, recipe, [text])


def test_a_byte_order_mark_is_skipped(recipe):
    """Editors on Windows write one."""
    plain = read_recipe(Recipe, recipe)
    recipe.write_bytes(b"\xef\xbb\xbf" + recipe.read_bytes())
    assert read_recipe(Recipe, recipe) == plain


@settings(deadline=None)
@given(
    st.one_of(
        st.integers(-(2**60), 2**60),
        st.floats(allow_nan=False),
        st.booleans(),
        st.lists(st.integers(0, 9)),
    )
)
def test_override_values_are_toml(value):
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    (found,) = override({}, [f"key={text}"]).values()
    assert found == value and type(found) is type(value)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1))
def test_override_values_that_are_not_toml_are_text(text):
    try:
        tomllib.loads(f"value = {text.strip()}")
    except tomllib.TOMLDecodeError:
        if text.strip()[:1] in ('"', "'"):
            with pytest.raises(UserError, match="not valid TOML"):
                override({}, [f"key={text}"])
        else:
            assert override({}, [f"key={text}"]) == {"key": text.strip()}


def test_overrides_create_missing_sections():
    assert override({}, ["a.b.c=1"]) == {"a": {"b": {"c": 1}}}


@pytest.mark.parametrize(
    ("values", "unknown", "close", "valid"),
    [
        ({"titel": ""}, "titel", "title", "inner, maybe, mode, parts, title"),
        ({"inner": {"sizes": 1}}, "inner.sizes", "size", "names, size"),
        ({"parts": [{}, {"name": 1}]}, "parts.1.name", "names", "names, size"),
    ],
)
def test_the_message_for_an_unknown_key_lists_the_valid_keys(values, unknown, close, valid):
    with pytest.raises(UserError) as caught:
        check(Outer, values, "origin")
    assert str(caught.value) == (
        f"origin: unknown key '{unknown}' (did you mean '{close}'?); valid keys here: {valid}"
    )


def test_an_unknown_key_without_a_similar_one_gets_no_suggestion():
    with pytest.raises(UserError, match=r"unknown key 'zzz'; valid keys here: inner, maybe"):
        check(Outer, {"zzz": 1}, "origin")


def test_valid_keys_depend_on_the_kind_of_source(recipe):
    with pytest.raises(UserError) as caught:
        read_recipe(Recipe, recipe, ["data.sources.1.paht=1"])
    message = str(caught.value)
    assert "did you mean 'path'" in message
    assert message.endswith(
        "valid keys here: clean, held_out, kind, max_images, name, path, text_key, weight"
    )


def test_messages_use_the_alias_from(recipe):
    with pytest.raises(UserError) as caught:
        read_recipe(Recipe, recipe, ["form=runs/a"])
    message = str(caught.value)
    assert "did you mean 'from'?" in message
    assert " from_," not in message


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"inner": {"size": "many"}}, "inner.size"),
        ({"parts": [{"size": []}]}, "parts.0.size"),
        ({"mode": "c"}, "mode"),
        ({"maybe": "x"}, "maybe"),
        ({"inner": 3}, "inner"),
    ],
)
def test_a_wrong_value_names_its_key_and_the_file(values, key):
    with pytest.raises(UserError, match=rf"^origin: '{key}': "):
        check(Outer, values, "origin")


def test_all_mistakes_are_reported_together():
    with pytest.raises(UserError) as caught:
        check(Outer, {"titel": "", "mode": "c"}, "origin")
    assert "'titel'" in str(caught.value) and "'mode'" in str(caught.value)


def test_invalid_toml_is_reported_with_its_line(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[data\n")
    with pytest.raises(
        UserError, match=r"bad\.toml: not valid TOML .*line 1.*; a recipe is a TOML"
    ):
        read_recipe(Recipe, path)


def test_a_missing_recipe_is_named(tmp_path):
    example = r"name a recipe, a TOML file such as configs/demo\.toml"
    with pytest.raises(
        UserError, match=rf"no\.toml: cannot read the recipe \(No such .*; {example}"
    ):
        read_recipe(Recipe, tmp_path / "no.toml")
    with pytest.raises(UserError, match=rf"cannot read the recipe \(Is a directory\); {example}"):
        read_recipe(Recipe, tmp_path)
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(UserError, match=r"\(Is a directory\); name \S+/recipe\.toml$"):
        read_recipe(Recipe, tmp_path)


def test_a_recipe_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"# \xff\n")
    with pytest.raises(UserError, match=r"latin\.toml"):
        read_recipe(Recipe, tmp_path / "latin.toml")


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["stage=aux_router", "from=runs/ä b", "run=runs/it's", "data.tokenizers=runs/x"],
        ["codec.block_channels=[32, 64]", "pretrain.optimizer.learning_rate=1e-30"],
        ['model.groups=[{modalities = ["image", "text"], experts = 3}]', "model.hidden=96"],
        ["data.sources.0.path=a\\b", "data.held_out=0.1"],
    ],
)
def test_a_written_recipe_equals_the_original(recipe, tmp_path, changes):
    read = read_recipe(Recipe, recipe, changes)
    copy = tmp_path / "copy.toml"
    write_recipe(read, copy)
    assert read_recipe(Recipe, copy) == read
    values = tomllib.loads(copy.read_text(encoding="utf-8"))
    assert "from_" not in values and ("from" in values) == (read.from_ is not None)
    assert values["codec"].keys() == type(read.codec).model_fields.keys()


def test_the_written_demo_recipe_equals_the_original(tmp_path):
    read = read_recipe(Recipe, DEMO)
    write_recipe(read, tmp_path / "copy.toml")
    assert read_recipe(Recipe, tmp_path / "copy.toml") == read


def test_extends_merges_key_by_key(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "all.toml").write_text(
        'title = "base"\nparts = [{size = 5}, {size = 6}]\n[inner]\nsize = 2\nnames = ["a"]\n'
    )
    (tmp_path / "base" / "half.toml").write_text('extends = "all.toml"\n[inner]\nsize = 3\n')
    path = tmp_path / "recipe.toml"
    path.write_text('extends = "base/half.toml"\nparts = [{size = 7}]\n[inner]\nnames = []\n')
    read = read_recipe(Outer, path, ["title=new"])
    assert (read.title, read.inner.size, read.inner.names) == ("new", 3, ())
    assert [part.size for part in read.parts] == [7]
    assert "extends" not in read.model_dump()
    write_recipe(read, tmp_path / "resolved.toml")
    assert read_recipe(Outer, tmp_path / "resolved.toml") == read


def test_several_bases_are_merged_in_their_order(tmp_path):
    (tmp_path / "one.toml").write_text('title = "one"\n[inner]\nsize = 2\nnames = ["a"]\n')
    (tmp_path / "two.toml").write_text('title = "two"\nparts = [{size = 5}]\n[inner]\nsize = 3\n')
    path = tmp_path / "recipe.toml"
    path.write_text('extends = ["one.toml", "two.toml"]\n[inner]\nsize = 4\n')
    read = read_recipe(Outer, path)
    assert (read.title, read.inner.size, read.inner.names) == ("two", 4, ("a",))
    assert [part.size for part in read.parts] == [5]


@pytest.mark.parametrize(
    ("text", "base", "named"),
    [
        ('extends = "base.toml"', None, "base.toml: cannot read the recipe, which .*recipe.toml"),
        ('extends = "base.toml"', "size = [", "base.toml: not valid TOML"),
        ('extends = "base.toml"', 'extends = "recipe.toml"', "recipe.toml: extends itself"),
        ('extends = "recipe.toml"', None, "recipe.toml: extends itself"),
        ("extends = 3", None, "'extends': .*; name a file"),
        ("extends = []", None, "'extends': .*, or a list of files"),
        ('extends = ["base.toml", 3]', "", "'extends': .*, or a list of files"),
        ('extends = ["base.toml", "recipe.toml"]', "", "recipe.toml: extends itself"),
        ('extends = "base.toml"', "sizes = 3", "unknown key 'sizes'"),
        ('extends = "base.toml"', "inner = 3", "'inner'"),
    ],
)
def test_a_wrong_extends_is_refused(tmp_path, text, base, named):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    if base is not None:
        (tmp_path / "base.toml").write_text(base)
    with pytest.raises(UserError, match=named):
        read_recipe(Outer, path)


def test_an_unknown_key_of_a_source_is_named_as_written(recipe):
    with pytest.raises(UserError) as caught:
        read_recipe(Recipe, recipe, ["data.sources.0.color=1"])
    message = str(caught.value)
    assert "unknown key 'data.sources.0.color'" in message
    assert "at least 1 item" not in message and ";" not in message.partition("valid keys here")[2]


def test_shipped_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped, own = Path("configs/demo.toml"), Path("demo.toml")
    assert find_recipe(shipped).read_text() == (Path(__file__).parents[1] / shipped).read_text()
    assert find_recipe(own) == own and find_recipe(Path("configs/x.toml")) == Path("configs/x.toml")
    own.write_text('extends = "configs/demo.toml"\nseed = 7')
    assert read_recipe(Recipe, own).seed == 7
    shipped.parent.mkdir()
    shipped.write_text("")
    assert find_recipe(shipped) == shipped
