"""The lm-evaluation-harness on a run: its log-likelihoods are ours, and its command line runs."""

import json
import subprocess
import sys

import pytest
import torch

import moma

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from moma.errors import UserError
from moma.evaluate.harness import MomaLM
from moma.evaluate.suite import run_suite
from moma.generate.mixed import MixedModel
from moma.generate.sampling import Sampling
from moma.generate.settings import Settings
from moma.model.decoding import prepare_decoding
from moma.runs import Run
from moma.runtime.world import World
from moma.tokenizers.text import encode_text
from moma.train.restore import load_run
from tests.evaluate.reference import slow_nats
from tests.processes import on_ranks

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
output_type: multiple_choice
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def lm(trained):
    return MomaLM(str(trained / "run"))


@pytest.fixture(scope="module")
def mixed(trained):
    model, recipe = load_run(Run(trained / "run"))
    return MixedModel.assemble(model, Run(trained / "run").tokenizers, recipe.data.sequence_length)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with two tasks on the same rows."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": f"the red {n}", "choices": ["no", "a green apple", "left of"], "answer": n % 3}
        for n in range(7)
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, rest in (("pick", CHOICE), ("write", GENERATE)):
        text = TASK.format(name=name, folder=tmp_path) + rest
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def test_generation_uses_the_decoder_of_cpus(trained, monkeypatch):
    prepared = []

    def prepare(model):
        prepare_decoding(model)
        prepared.append(model)

    monkeypatch.setattr("moma.evaluate.harness.prepare_decoding", prepare)
    MomaLM(str(trained / "run"))
    assert [model.cpu_decoder is not None for model in prepared] == [True]


def requests(kind, *arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_log_likelihoods_equal_ours(lm, mixed):
    cases = [("the red", " apple"), ("", "left of"), ("red ", "green"), ("x" * 100, " left")]
    found = lm.loglikelihood(requests("loglikelihood", *cases))
    beginning = mixed.model.vocabulary.beginning
    for (context, continuation), (log_likelihood, is_greedy) in zip(cases, found, strict=True):
        prompt = [beginning, *encode_text(mixed.tokenizer, context.rstrip())]
        if context.endswith(" "):
            continuation = " " + continuation
        target = encode_text(mixed.tokenizer, continuation)
        prompt = prompt[max(0, len(prompt) + len(target) - 65) :]
        assert log_likelihood == pytest.approx(-slow_nats(mixed.model, prompt, target), rel=1e-4)
        ids = torch.tensor([[*prompt, *target]])
        logits = mixed.model(ids[:, :-1], routing=mixed.model.named_routing("causal")).head[0]
        assert is_greedy == (logits.argmax(-1)[-len(target) :].tolist() == target)


def test_rolling_log_likelihood_is_that_of_all_tokens(lm, mixed):
    text = "red green rocket left of an apple"
    ids = mixed.encode([text])
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert found == pytest.approx(-slow_nats(mixed.model, ids[:1], ids[1:]), rel=1e-4)
    # More than a context: each token is scored once, in windows.
    long = " ".join([text] * 9)
    (of_long,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (long,)))
    assert of_long < 5 * found


def test_generation_stops_and_is_greedy(lm, mixed):
    settings = {"until": ["\n"], "max_gen_toks": 6}
    greedy = Sampling(temperature=0, top_p=1)
    (expected,) = mixed.generate([["red green"]], Settings("text", greedy, new_tokens=6))
    text = "".join(expected)
    calls = [("red green", settings), ("red green", settings | {"until": [text[2:4]]})]
    calls.append(("left " * 200, settings))
    found = lm.generate_until(requests("generate_until", *calls))
    assert found[0] == text.partition("\n")[0]
    assert found[1] == text[: text.index(text[2:4])]
    sampled = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 6}
    assert lm.generate_until(requests("generate_until", ("red green", sampled))) != [text]


def test_generation_is_routed_as_the_scores(trained):
    calls = [(prompt, {"max_gen_toks": 12}) for prompt in ("the red", "a green apple", "left of")]
    greedy, found = Sampling(temperature=0, top_p=1), []
    for routing in ("auxiliary", "threshold"):
        own = MomaLM(str(trained / "run"), routing=routing)
        found.append(own.generate_until(requests("generate_until", *calls)))
        loaded = moma.load(trained / "run", routing)
        answers = loaded.generate(
            [[prompt] for prompt, _ in calls], Settings("text", greedy, new_tokens=12)
        )
        assert found[-1] == ["".join(map(str, answer)) for answer in answers]
    assert found[0] != found[1]


def test_generation_samples_as_the_task_says(lm, mixed):
    """A repetition penalty, and min-p of 1, which leaves the most likely token."""
    settings = {"max_gen_toks": 8, "repetition_penalty": 5.0}
    sampling = Sampling(temperature=0, top_p=1, repetition_penalty=5.0)
    (expected,) = mixed.generate([["red green"]], Settings("text", sampling, new_tokens=8))
    assert lm.generate_until(requests("generate_until", ("red green", settings))) == expected
    settings |= {"do_sample": True, "temperature": 2.0, "min_p": 1.0}
    sampling = Sampling(temperature=2.0, top_p=1, min_p=1, repetition_penalty=5.0)
    (expected,) = mixed.generate([["red green"]], Settings("text", sampling, new_tokens=8))
    assert lm.generate_until(requests("generate_until", ("red green", settings))) == expected


def test_settings_that_sampling_does_not_have(lm):
    settings = {"num_beams": 4, "typical_p": 0.5, "top_k": 3}
    message = "generation_kwargs: num_beams, typical_p: not supported; use until, max_gen_toks"
    with pytest.raises(UserError, match=message):
        lm.generate_until(requests("generate_until", ("red", settings)))


def test_generation_of_more_than_half_of_the_context(lm, capsys):
    calls = [("red", {"max_gen_toks": 33}), ("red", {"max_gen_toks": 33, "until": ["\n"]})]
    lm.generate_until(requests("generate_until", *calls))
    error = capsys.readouterr().err
    assert error.count("max_gen_toks 33: generating at most 32 tokens, half of the context") == 1
    lm.generate_until(requests("generate_until", ("red", {"max_gen_toks": 32})))
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_tasks_have_the_accuracy_of_our_suite(lm, mixed, trained, tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    result = simple_evaluate(lm, tasks=["pick", "write"], task_manager=manager, bootstrap_iters=0)
    data = load_run(Run(trained / "run"))[1].data
    world = World(torch.device("cpu"))
    file = tasks / "test.jsonl"
    ours = run_suite("multiple_choice", mixed, data, world, file, quiet=True)["sources"]["all"]
    theirs = result["results"]["pick"]
    assert theirs["acc,none"] == pytest.approx(ours["accuracy"]["value"])
    assert theirs["acc_norm,none"] == pytest.approx(ours["accuracy_normalized"]["value"])
    assert "exact_match,none" in result["results"]["write"]


def test_run_must_exist():
    with pytest.raises(UserError, match="missing: there is no such folder"):
        MomaLM("missing")


def test_continuation_longer_than_the_context(lm):
    with pytest.raises(UserError, match="a continuation has"):
        lm.loglikelihood(requests("loglikelihood", ("red", " left" * 99)))


def evaluate_on_rank(world, run, tasks, out):
    MomaLM.world = world
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    result = simple_evaluate(
        MomaLM(run), tasks=["pick", "write"], task_manager=manager, bootstrap_iters=0
    )
    assert (result is None) == (world.rank > 0)
    if result is not None:
        (out / f"{world.size}.json").write_text(json.dumps(result["results"]))


@pytest.mark.slow
def test_two_ranks_share_the_requests(trained, tasks):
    run = str(trained / "run")
    evaluate_on_rank(World(torch.device("cpu")), run, tasks, tasks)
    on_ranks(2, evaluate_on_rank, run, tasks, tasks)
    one, two = (json.loads((tasks / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert two["pick"]["acc,none"] == one["pick"]["acc,none"]
    assert two["write"]["exact_match,none"] == one["write"]["exact_match,none"]


@pytest.mark.slow
def test_command_line(trained, tasks):
    call = [
        sys.executable,
        "-m",
        "moma.evaluate.harness",
        "--model",
        "moma",
        "--tasks",
        "pick,write",
    ]
    call += ["--model_args", f"run={trained}/run", "--include_path", str(tasks)]
    call += ["--output_path", str(tasks / "out")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout
    (file,) = (tasks / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["pick"]["acc,none"] >= 0
    call[call.index(f"run={trained}/run")] = "run=missing"
    failed = subprocess.run(call, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("moma: missing: there is no such folder")
