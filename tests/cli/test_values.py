"""Values of every verb are checked on entry."""

import shlex

import pytest

from tests.command_line import make_input, moma, refuses, succeeds


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["evaluate", ""], "RUN: is empty"),
        (["evaluate", "{run}", "--data", ""], "--data: is empty"),
        (["generate", "{run}", "--prompt", "a", "--out", ""], "--out: is empty"),
        (["generate", "{run}", "--image", " "], "--image: is empty"),
        (["inspect", "{run}", "--prompt", "a", "--out", ""], "--out: is empty"),
        (["report", ""], "RUNS: is empty"),
        (["report", "{run}", "--out="], "--out: is empty"),
        (["data", "inspect", ""], "FOLDER: is empty"),
        (["data", "inspect", "{data}", "--source", ""], "--source: is empty"),
        (["data", "inspect", "{data}", "--out", ""], "--out: is empty"),
        (["tokenizer", "train-text", "a.txt", "--out", ""], "--out: is empty"),
        (["tokenizer", "train-text", ""], "INPUTS: is empty"),
        (["tokenizer", "show", "", "--text", "a"], "FOLDER: is empty"),
        (["import", "{run}", ""], "RUN: is empty"),
        (["export", "", "a"], "RUN: is empty"),
        (["train", ""], "RECIPE: is empty"),
        (["train", "{recipe}", ""], "OVERRIDES: is empty"),
        (["train", "{recipe}", "run="], "'run': is empty"),
        (["prepare", "{recipe}", "data.path="], "'data.path': is empty"),
        (["plan", "{recipe}", "from="], "'from': is empty"),
        (["demo", "--out", ""], "--out: is empty"),
        (["bench", "data", ""], "RECIPE: is empty"),
        (["evaluate", "a\udcff"], "RUN 'a\\udcff': is not valid UTF-8"),
        (["evaluate", "~nobody-here/a"], "RUN '~nobody-here/a': no such user"),
        (["evaluate", "{run}", "--data", "x" * 5000], "xxx': is too long: a path has fewer"),
        (["plan", "{recipe}", "run=" + "x" * 5000], "'run': is too long"),
        (["tokenizer", "train-text", "x" * 5000], "a file is too long"),
        (["bench", "throughput", "~nobody-here/a"], "a file no such user"),
        (["data", "inspect", "{data}", "--source", "~"], "--source ~: "),
    ],
)
def test_an_empty_or_unusable_name_is_refused(trained, call, message):
    fill = {"run": trained / "run", "data": trained / "data", "recipe": trained / "recipe.toml"}
    assert message in refuses(*(word.format(**fill) for word in call))


def test_a_loop_of_links_is_refused(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for call in (["train", loop], ["evaluate", loop], ["data", "inspect", loop], ["report", loop]):
        assert "loop of symbolic links" in refuses(*call)


def test_messages_are_short_single_lines(trained, tmp_path):
    name = tmp_path / "a\nb\x1b[2Jc"
    for call in (["evaluate", name], ["train", name], ["plan", trained / "recipe.toml", name]):
        assert "a\\nb\\x1b[2Jc" in refuses(*call)
    assert len(refuses("plan", trained / "recipe.toml", "x" * 100_000)) < 1000
    assert len(refuses("plan", trained / "recipe.toml", "x" * 100_000 + "=1")) < 5000


def test_an_empty_run_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    recipe = make_input(tmp_path)
    monkeypatch.chdir(folder)
    refuses("train", recipe, "run=")
    chain = tmp_path / "chain.toml"
    chain.write_text('extends = "recipe.toml"\nrun = ""\n[[chain]]\nname = "a"\n')
    assert "'run': is empty" in refuses("train", chain)
    chain.write_text('extends = "recipe.toml"\n[[chain]]\nname = "../a"\n')
    assert "'name'" in refuses("train", chain)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("call", "option"),
    [
        (["generate", "{run}", "--prompt", "a", "--seed", "99999999999999999999"], "--seed"),
        (["generate", "{run}", "--prompt", "a", "--seed", "-1"], "--seed"),
        (["generate", "{run}", "--prompt", "a", "--seed", "1e3"], "--seed"),
        (["generate", "{run}", "--prompt", "a", "--temperature", "nan"], "temperature nan"),
        (["generate", "{run}", "--prompt", "a", "--temperature", "inf"], "temperature inf"),
        (["generate", "{run}", "--prompt", "a", "--temperature", "1e-40"], "temperature"),
        (["generate", "{run}", "--prompt", "a", "--temperature", "1e39"], "temperature"),
        (["generate", "{run}", "--prompt", "a", "--top-p", "nan"], "top_p nan"),
        (["generate", "{run}", "--prompt", "a", "--top-p", "1e-50"], "top_p 1e-50"),
        (["plan", "{recipe}", "--gpus", "0"], "--gpus"),
        (["plan", "{recipe}", "--gpus", "9" * 30], "--gpus"),
        (["plan", "{recipe}", "--mfu", "nan"], "--mfu"),
        (["plan", "{recipe}", "--peak", "inf"], "--peak"),
        (["plan", "{recipe}", "--price", "nan"], "--price"),
        (["plan", "{recipe}", "--memory=-1"], "--memory"),
        (["plan", "{recipe}", "--gpus", "8", "--peak", "1e300"], "--peak"),
        (["plan", "{recipe}", "--gpus", "8", "--link", "1e-320"], "--link"),
        (["plan", "{recipe}", "--gpus", "8", "--mfu", "1e-320"], "--mfu"),
        (["plan", "{recipe}", "--price", "1e308"], "--price"),
        (["data", "inspect", "{data}", "--source", "text", "--document", "9" * 30], "--document"),
        (["data", "inspect", "{data}", "--split", "test"], "--split"),
        (["prepare", "{recipe}", "--processes", "0"], "--processes"),
        (["bench", "data", "--repeats", "0"], "--repeats"),
        (["bench", "layer", "--dtype", "fp8"], "--dtype"),
        (["bench", "layer", "--tokens", "33"], "--tokens"),
        (["bench", "throughput", "--table2", "--row", "7b"], "--row"),
        (["tokenizer", "import-chameleon", "a", "b", "--image-size", "0"], "--image-size"),
    ],
)
def test_numbers_out_of_range_are_refused(trained, call, option):
    fill = {"run": trained / "run", "data": trained / "data", "recipe": trained / "recipe.toml"}
    assert option in refuses(*(word.format(**fill) for word in call))


@pytest.mark.parametrize(
    ("call", "unused"),
    [
        (["plan", "{recipe}", "--price", "3"], "--price: no effect without --gpus"),
        (["plan", "{recipe}", "--mfu", "0.4", "--link=9"], "--mfu, --link: no effect without"),
        (
            ["data", "inspect", "{data}", "--split", "train"],
            "--split: no effect without --document",
        ),
        (
            ["tokenizer", "show", "{run}", "--text", "a", "--out", "a.png"],
            "--out: no effect without",
        ),
        (["bench", "throughput", "{recipe}", "--row", "90m"], "--row: no effect without --table2"),
        (["bench", "throughput", "{recipe}", "--only", "moe_8x"], "--only: no effect without"),
        (
            ["generate", "{run}", "--prompt", "a", "--mode", "text", "--out", "a"],
            "--out: no effect with --mode text",
        ),
    ],
)
def test_options_without_effect_are_refused(trained, call, unused):
    fill = {"run": trained / "run", "data": trained / "data", "recipe": trained / "recipe.toml"}
    assert unused in refuses(*(word.format(**fill) for word in call))


@pytest.mark.parametrize(
    "call",
    [
        ["evaluate", "{run}", "--routing", "choice", "--routing", "causal"],
        ["generate", "{run}", "--prompt", "a", "--seed", "1", "--seed", "2"],
        ["report", "{run}", "--out", "a.html", "--out", "b.html"],
        ["tokenizer", "show", "{run}", "--text", "a", "--text", "b"],
        ["plan", "{recipe}", "--gpus", "1", "--gpus", "2"],
        ["demo", "--out", "a", "--out", "b"],
        ["bench", "data", "--repeats", "1", "--repeats", "2"],
    ],
)
def test_repeated_options_with_one_value_are_refused(trained, call):
    fill = {"run": trained / "run", "recipe": trained / "recipe.toml"}
    assert "given 2 times; give it once" in refuses(*(word.format(**fill) for word in call))


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "2"}, "RANK=''"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "-1"}, "MASTER_PORT='-1'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_PORT": "1"}, "RANK=2"),
    ],
)
def test_a_wrong_environment_of_a_job_is_refused(trained, monkeypatch, environment, named):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    outcome = moma("train", trained / "recipe.toml")
    assert outcome.code == 2 and named in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.parametrize("rank", ["", "x"])
def test_a_wrong_rank_does_not_hide_the_message(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    assert "no.toml: cannot read" in moma("train", tmp_path / "no.toml").err


def test_a_run_given_twice_is_refused(trained, tmp_path):
    runs = [trained / "run", trained / "images" / ".." / "run"]
    assert "given 2 times" in refuses("report", *runs, "--out", tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_flag_may_be_repeated(trained):
    assert succeeds("plan", trained / "recipe.toml", "--json", "--json").startswith("{")


def test_prompts_and_images_keep_their_order(trained, monkeypatch):
    contents = []

    def generate(self, prompts, *rest, **options):
        contents.append(prompts[0])
        return [[]]

    monkeypatch.setattr("moma.generate.mixed.MixedModel.generate", generate)
    images = [trained / "images" / f"{number}.png" for number in (1, 2)]
    parts = ["--image", images[0], "--prompt", "one", "--image", images[1], "--prompt", "two"]
    moma("generate", trained / "run", *parts)
    moma("generate", trained / "run", *parts[4:], *parts[:4])
    kinds = [[part if isinstance(part, str) else "image" for part in each] for each in contents]
    assert kinds == [["image", "one", "image", "two"], ["image", "two", "image", "one"]]
    first, second = contents[0][0], contents[0][2]
    assert first.tobytes() != second.tobytes()
    assert first.tobytes() == contents[1][2].tobytes()


def test_arguments_after_two_dashes_are_not_options(trained):
    assert "unknown key '--steps'" in refuses("train", trained / "recipe.toml", "--", "--steps=3")
    assert "unexpected extra argument" in refuses(
        "generate", trained / "run", "--prompt", "a", "--", "--seed", "1"
    )


def test_printed_commands_are_quoted_and_can_be_run(trained, tmp_path):
    run = tmp_path / "a & b [v2]"
    changes = ("model.groups=dense", f"run={run}")
    printed = succeeds("train", trained / "recipe.toml", *changes)
    command = shlex.split(printed.split("next: ")[1])
    assert command[:2] == ["moma", "evaluate"]
    assert "[v2]" in succeeds(*command[1:])
    run = tmp_path / "c & d"
    succeeds("train", trained / "recipe.toml", f"run={run}", "pretrain.steps=2")
    command = shlex.split(refuses("evaluate", run, "--routing", "auxiliary").split("`")[1])
    assert f"from={run}" in command and f"run={run}/aux_router" in command
    succeeds(*command[1:], "aux_router.steps=2")
    succeeds("evaluate", run, "--routing", "auxiliary")
