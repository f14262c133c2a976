"""`moma train` processes that are killed at random moments end like uninterrupted ones.

A few kills are in the default run; twenty over all stages, on one and two ranks:
`pytest -m slow tests/train/test_kills.py`.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moma.errors import StoppedError
from moma.evaluate.perplexity import evaluate
from moma.runs import Run
from moma.runtime.checkpoint import checkpoints_in
from moma.runtime.world import World
from moma.train.chain import read_chain, run_chain
from moma.train.loop import train
from moma.train.metrics import TIMING_KEYS
from moma.train.recipe import Recipe
from tests.factories import write_recipe
from tests.processes import Command

STEPS, CHECKPOINT_EVERY = 48, 4
FEW_STEPS = 32  # for one kill and one signal
ROOT = Path(__file__).parents[2]
Process = Command | subprocess.Popen[str]


def recipe_of(
    tiny: Recipe, run: Path, stage: str, seed_run: Path | None, file: Path, steps: int = STEPS
) -> Recipe:
    """A recipe with everything that draws random numbers or runs in a thread."""
    changes = {"steps": steps, "checkpoint_every": CHECKPOINT_EVERY}
    groups = "moe_1t1i" if stage == "seed" else "moe_2t2i"
    model = {"groups": groups, "dropout": 0.1, "router_noise": stage != "seed"}
    name = "pretrain" if stage == "seed" else stage
    recipe = tiny.model_copy(
        update={
            "run": run,
            "stage": name,
            "from_": seed_run,
            "model": tiny.model.model_copy(update=model),
            "data": tiny.data.model_copy(update={"workers": 3}),
            name: getattr(tiny, name).model_copy(
                update=changes
                | {"compile": False, "log_every": 2, "optimizer": tiny.pretrain.optimizer}
            ),
        }
    )
    write_recipe(recipe, file)
    return recipe


def start(file: Path, ranks: int, *options: str) -> Process:
    """Train in a process, or in one process per rank below a launcher."""
    if ranks == 1:
        return Command(file.parent, "train", file)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, *options, "-m", "moma", "train", str(file)]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see docs/train.md
    }
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def log_of(run: Run) -> int:
    """Identifies the log file: a resumed process writes a new one."""
    return run.metrics.stat().st_ino if run.metrics.is_file() else 0


def wait_for_record(process: Process, run: Run, before: int, after: int) -> None:
    """Wait until a log other than `before` has a record beyond a step, or the process ended."""
    while process.poll() is None:
        records = run.read_metrics() if log_of(run) not in (0, before) else []
        if records and records[-1]["step"] > after:
            return
        time.sleep(0.002)


def finish(file: Path, ranks: int) -> None:
    process = start(file, ranks)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors


def last_step(run: Run) -> int:
    found = checkpoints_in(run.checkpoints)
    return int(found[-1].name[-8:]) if found else 0


def killed(file: Path, run: Run, ranks: int, chance: random.Random) -> str:
    """Start, kill every process at a random moment, and describe the moment."""
    before = last_step(run)
    log, process = log_of(run), start(file, ranks)
    wait_for_record(process, run, log, before + chance.randrange(2 * CHECKPOINT_EVERY))
    if chance.random() < 0.5:  # while a checkpoint is written, if possible
        end = time.monotonic() + 5
        while process.poll() is None and time.monotonic() < end:
            if list(run.checkpoints.glob("*.partial")):
                break
    time.sleep(chance.uniform(0, 0.05))
    writing = [path.name for path in run.checkpoints.glob("*.partial")]
    # torchrun's workers are not in its process group.
    for number in (*descendants(process.pid), process.pid):
        os.kill(number, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had already ended"
    return f"killed at {last_step(run)} writing {writing}"


def descendants(process: int) -> list[int]:
    """Processes that a process started, and their own."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def contents(run: Run) -> tuple[dict[str, torch.Tensor], list[dict]]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((checkpoints_in(run.checkpoints)[-1] / "tensors").glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                tensors[f"{file.name} {key}"] = opened.get_tensor(key)
    records = [
        {k: v for k, v in record.items() if k not in TIMING_KEYS} for record in run.read_metrics()
    ]
    return tensors, records


def assert_same(one: Run, other: Run, steps: int = STEPS) -> None:
    (tensors, records), (others, other_records) = contents(one), contents(other)
    assert [record["step"] for record in other_records] == list(range(2, steps + 1, 2))
    assert records == other_records
    assert tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, others[key]), key


def source_of(tiny: Recipe, folder: Path, stage: str) -> Path | None:
    """The finished run that a stage needs."""
    if stage == "pretrain":
        return None
    seed = {"upcycle": "seed", "aux_router": "pretrain"}[stage]
    recipe_of(tiny, folder / "source", seed, None, folder / "source.toml")
    finish(folder / "source.toml", 1)
    return folder / "source"


def check_kills(tiny: Recipe, folder: Path, stage: str, ranks: int, kills: int) -> None:
    chance = random.Random(kills)
    source = source_of(tiny, folder, stage)
    runs = {}
    for name in ("uninterrupted", "interrupted"):
        recipe_of(tiny, folder / name, stage, source, folder / f"{name}.toml")
        runs[name] = Run(folder / name)
    finish(folder / "uninterrupted.toml", ranks)
    for _ in range(kills):
        print(
            stage,
            ranks,
            killed(folder / "interrupted.toml", runs["interrupted"], ranks, chance),
            flush=True,
        )
    finish(folder / "interrupted.toml", ranks)
    assert_same(runs["uninterrupted"], runs["interrupted"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "ranks", "kills"),
    [
        ("pretrain", 1, 5),
        ("pretrain", 2, 4),
        ("upcycle", 1, 3),
        ("upcycle", 2, 2),
        ("aux_router", 1, 4),
        ("aux_router", 2, 2),
    ],
)
def test_repeated_kills(tiny, tmp_path, stage, ranks, kills):
    check_kills(tiny, tmp_path, stage, ranks, kills)


def test_killed_and_stopped_run_equals_uninterrupted(tiny, tmp_path):
    """One SIGKILL, one SIGTERM between two log records, then to the last step."""
    world, folder, file = World(torch.device("cpu")), tmp_path / "run", tmp_path / "run.toml"
    recipe = recipe_of(tiny, folder, "pretrain", None, file, FEW_STEPS)
    reference = recipe.model_copy(update={"run": tmp_path / "uninterrupted"})
    uninterrupted = train(reference, world, quiet=True)
    run = Run(folder)
    killed(file, run, 1, random.Random(1))
    before = last_step(run)
    log, process = log_of(run), start(file, 1)
    wait_for_record(process, run, log, before)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == StoppedError.CODE, errors
    step = last_step(run)
    assert step > before
    assert f"stopped by SIGTERM after step {step}" in errors
    train(recipe, world, quiet=True)
    assert_same(uninterrupted, run, FEW_STEPS)
    newest = run.checkpoints / (run.checkpoints / "latest").read_text().strip()
    state = json.loads((newest / "state.json").read_text())
    assert state["step"] == FEW_STEPS
    assert state["tokens"] == run.read_metrics()[-1]["tokens"]


def test_a_killed_chain_equals_an_uninterrupted_one(tiny, tmp_path):
    """Killed in its second stage, then completed by one command."""
    changes = {"compile": False, "log_every": 2, "checkpoint_every": 4}
    stage = {"optimizer": tiny.pretrain.optimizer, **changes}
    seed = tiny.pretrain.model_copy(update={"steps": 4})
    upcycle = tiny.upcycle.model_copy(update={"steps": FEW_STEPS, **stage})
    base = tiny.model_copy(update={"pretrain": seed, "upcycle": upcycle})
    write_recipe(base, tmp_path / "base.toml")
    for name in ("uninterrupted", "interrupted"):
        (tmp_path / f"{name}.toml").write_text(
            f'''extends = "base.toml"
run = "{tmp_path}/{name}"
[[chain]]
name = "seed"
model = {{ groups = "moe_1t1i", dropout = 0.1 }}
[[chain]]
stage = "upcycle"
model = {{ groups = "moe_2t2i", router_noise = true }}
[[chain]]
stage = "aux_router"
'''
        )
    world = World(torch.device("cpu"))
    run_chain(read_chain(tmp_path / "uninterrupted.toml"), world, evaluate, quiet=True)
    interrupted = tmp_path / "interrupted"
    killed(tmp_path / "interrupted.toml", Run(interrupted / "upcycle"), 1, random.Random(2))
    assert not (interrupted / "upcycle/aux_router").exists()
    run_chain(read_chain(tmp_path / "interrupted.toml"), world, evaluate, quiet=True)
    for part, steps in (("seed", 4), ("upcycle", FEW_STEPS), ("upcycle/aux_router", 6)):
        assert_same(
            Run(tmp_path / "uninterrupted" / part), Run(tmp_path / "interrupted" / part), steps
        )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_repeated_signals(tiny, tmp_path, ranks):
    """Every rank of a job gets the signal, as from Slurm."""
    for name in ("uninterrupted", "interrupted"):
        recipe_of(tiny, tmp_path / name, "pretrain", None, tmp_path / f"{name}.toml")
    finish(tmp_path / "uninterrupted.toml", ranks)
    run = Run(tmp_path / "interrupted")
    for number in (signal.SIGTERM, signal.SIGINT):
        before = last_step(run)
        log, process = log_of(run), start(tmp_path / "interrupted.toml", ranks)
        wait_for_record(process, run, log, before)
        # torchrun forwards each signal to its ranks once more.
        ranks_too = descendants(process.pid) if number == signal.SIGTERM else ()
        for each in (*ranks_too, process.pid):
            os.kill(each, number)
        _, errors = process.communicate(timeout=500)
        assert process.returncode != 0
        assert f"stopped by {number.name} after step {last_step(run)}" in errors
        assert last_step(run) > before
    finish(tmp_path / "interrupted.toml", ranks)
    assert_same(Run(tmp_path / "uninterrupted"), run)


@pytest.mark.slow
def test_a_lost_rank_is_reported_and_torchrun_restarts(tiny, tmp_path):
    for name in ("uninterrupted", "interrupted"):
        recipe_of(tiny, tmp_path / name, "pretrain", None, tmp_path / f"{name}.toml")
    finish(tmp_path / "uninterrupted.toml", 2)
    run, file = Run(tmp_path / "interrupted"), tmp_path / "interrupted.toml"
    process = start(file, 2, "--max-restarts", "1")
    wait_for_record(process, run, 0, 2 * CHECKPOINT_EVERY)
    os.kill(descendants(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert "lost rank " in errors
    assert_same(Run(tmp_path / "uninterrupted"), run)
