"""The launch scripts, with stand-ins for the programs that they call."""

import json
import os
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo node1; else echo "$@" >> "$FOUND/requeued"; fi
"""
# Like Slurm: two tasks in process groups of their own; signals are forwarded, the first failed task
# ends the other with SIGTERM, and srun returns the highest code.
SRUN = """#!/bin/bash
set -m
[ "$1 $2" = "--kill-on-bad-exit=1 --cpus-per-task=4" ] || exit 2
shift 2
highest=0
for n in 0 1; do SLURM_PROCID=$n SLURM_LOCALID=$n "$@" & tasks[n]=$!; done
forward() { for task in "${tasks[@]}"; do kill -TERM -- "-$task" 2> /dev/null; done; }
trap forward TERM
echo "$MASTER_ADDR $WORLD_SIZE" > "$FOUND/started"
left=2
while [ $left -gt 0 ]; do
  wait -n -p ended "${tasks[@]}"; code=$?
  [ -z "$ended" ] && continue  # a signal was forwarded
  for n in "${!tasks[@]}"; do [ "${tasks[n]}" = "$ended" ] && unset "tasks[n]"; done
  left=$((left - 1))
  [ $code -gt $highest ] && highest=$code
  [ $code -ne 0 ] && forward
  ended=
done
exit $highest
"""
# Task N runs the file `task-N` once both tasks have started.
MOMA = """#!/bin/bash
echo "$@" >> "$FOUND/called"
until [ "$(wc -l < "$FOUND/called")" = 2 ]; do sleep 0.02; done
. "$FOUND/task-$RANK"
"""
# Until SIGTERM, and then as without a handler, or as after saving a checkpoint.
LOADING = "sleep 60 & wait; exit 9"
SAVING = "trap 'exit 75' TERM; sleep 60 & wait; exit 9"
IGNORING = "trap '' TERM; sleep 1; exit 1"


def write_programs(folder: Path, **programs: str) -> None:
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def run_as_job(
    programs: Path, environment: dict[str, str], name: str, *arguments: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a script of `launch` as the job 7 of Slurm, with programs of a folder."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4"}
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(LAUNCH / name), *arguments],
        env=os.environ | path | slurm | environment,
        check=False,
    )


@pytest.fixture
def slurm(tmp_path):
    write_programs(tmp_path, scontrol=SCONTROL, srun=SRUN, moma=MOMA)

    def run(*tasks: str, preempt=False, restarts=0, linger=0) -> tuple[int, bool, str]:
        """Exit code, whether the job was requeued, and standard error."""
        for name in ("started", "called", "requeued"):
            (tmp_path / name).unlink(missing_ok=True)
        for number, text in enumerate(tasks):
            (tmp_path / f"task-{number}").write_text(text)
        its = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "16"}
        its |= {"SLURM_CPUS_PER_TASK": "4"}
        its |= {"SLURM_RESTART_COUNT": str(restarts), "LINGER": str(linger), "MAX_FAILURES": "2"}
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FOUND": str(tmp_path)}
        process = subprocess.Popen(
            ["bash", str(LAUNCH / "slurm.sbatch"), "my.toml"],
            env=os.environ | its | path,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            start_new_session=True,
        )
        while not (tmp_path / "started").exists() and process.poll() is None:
            time.sleep(0.02)
        if preempt:
            while not (tmp_path / "called").exists() and process.poll() is None:
                time.sleep(0.02)
            time.sleep(0.5)  # both tasks are running
            os.killpg(process.pid, signal.SIGTERM)  # the script and srun get it
        _, errors = process.communicate(timeout=60)
        return process.returncode, (tmp_path / "requeued").exists(), errors

    return run


@pytest.mark.parametrize(
    ("tasks", "expected_code", "requeued"),
    [
        (("exit 0", "exit 0"), 0, False),
        (("exit 2", SAVING), 2, False),
        ((LOADING, "exit 2"), 2, False),
        (
            ("exit 1", "sleep 0.5; exit 2"),
            2,
            False,
        ),  # the cause comes later
        ((IGNORING, "exit 74"), 0, True),
        (("exit 1", LOADING), 0, True),
    ],
)
def test_exit_codes(slurm, tmp_path, tasks, expected_code, requeued):
    code, again, _ = slurm(*tasks, linger=2)
    assert (code, again) == (expected_code, requeued)
    assert (tmp_path / "started").read_text() == "node1 16\n"
    assert (tmp_path / "called").read_text() == "train my.toml\n" * 2
    assert (tmp_path / "moma-7.failures").exists() == requeued


@pytest.mark.parametrize("tasks", [(LOADING, LOADING), (SAVING, SAVING), (LOADING, SAVING)])
def test_preemption_is_not_a_failure_even_before_the_first_step(slurm, tmp_path, tasks):
    code, again, errors = slurm(*tasks, preempt=True, restarts=99)
    assert (code, again) == (0, True), errors
    assert not (tmp_path / "moma-7.failures").exists()


def test_only_consecutive_failures_are_counted(slurm):
    for restarts in range(2):
        assert slurm("exit 1", "exit 137", restarts=restarts)[:2] == (0, True)
    assert slurm(SAVING, SAVING, preempt=True, restarts=2)[:2] == (0, True)
    for restarts in range(3, 5):
        assert slurm("exit 74", "exit 0", restarts=restarts)[:2] == (0, True)
    code, again, errors = slurm("exit 74", "exit 0", restarts=5)
    assert (code, again) == (1, False) and "gave up after 2 restarts" in errors
    assert "task 0 failed with exit code 74" in errors


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_prepare.sbatch"])
def test_jobs_ask_for_cores_and_memory(script):
    lines = (LAUNCH / script).read_text().splitlines()
    options = dict(
        line[10:].split("=") for line in lines if line.startswith("#SBATCH --") and "=" in line
    )
    assert int(options["cpus-per-task"]) > 1 and options["mem"] == "0"


def sky() -> dict:
    return yaml.safe_load((LAUNCH / "sky.yaml").read_text())


@pytest.mark.parametrize("before", ["nothing", "folder", "link"])
def test_the_sky_machine_prepares_and_trains_in_the_bucket(tmp_path, before):
    work, bucket, programs = (tmp_path / name for name in ("work", "bucket", "programs"))
    for folder in (work, bucket, programs):
        folder.mkdir()
    record = '#!/bin/bash\necho "$(basename "$0") $*" >> "$FOUND"\n'
    restarted = record + '[ "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" = 1 ]\n'
    write_programs(programs, moma=record, torchrun=restarted, pip=record)
    if before == "folder":
        (work / "runs").mkdir()
    elif before == "link":
        (work / "runs").symlink_to(bucket)
    job = sky()
    assert job["file_mounts"]["/runs"]["name"] == "${BUCKET}" and job["num_nodes"] == 1
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "FOUND": str(tmp_path / "found"),
        "RECIPE": job["envs"]["RECIPE"],
        "SKYPILOT_NUM_NODES": "1",
        "SKYPILOT_NODE_RANK": "0",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    for script in (job["setup"], job["run"].replace("/runs ", f"{bucket} ")):
        subprocess.run(["bash", "-c", script], cwd=work, env=environment, check=True)
    assert (work / "runs").is_symlink() and (work / "runs").resolve() == bucket
    assert not list(bucket.iterdir())
    installed, prepared, trained = (tmp_path / "found").read_text().splitlines()
    assert installed == "pip install -c constraints.txt -e .[demo]"
    assert prepared == "moma prepare configs/demo.toml"
    assert "--rdzv-endpoint 10.0.0.1:29500" in trained
    assert trained.endswith("-m moma train configs/demo.toml")


def test_several_machines_with_one_bucket_are_refused(tmp_path):
    environment = os.environ | {"SKYPILOT_NUM_NODES": "2"}
    call = subprocess.run(
        ["bash", "-c", sky()["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert call.returncode == 2 and "several machines" in call.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "expected", "requeued"), [(0, 0, False), (2, 2, False), (74, 0, True)]
)
def test_data_is_prepared_on_a_ray_cluster_of_the_nodes(tmp_path, code, expected, requeued):
    found = tmp_path / "found"
    found.mkdir()
    write_programs(
        tmp_path,
        scontrol=SCONTROL,
        srun='#!/bin/bash\n[ "$2" = --cpus-per-task=4 ] || exit 2\nSLURM_PROCID=0 exec "${@:3}"\n',
        ray='#!/bin/bash\necho "$RAY_AUTH_MODE $@" >> "$FOUND/ray"\n',
        moma=f'#!/bin/bash\necho "$@" > "$FOUND/moma"\nexit {code}\n',
    )
    environment = {"FOUND": str(found), "SLURM_JOB_NODELIST": "node[1-2]"}
    script = ("slurm_prepare.sbatch", "my.toml", "data.seed=1")
    done = run_as_job(tmp_path, environment, *script)
    assert done.returncode == expected
    assert (found / "moma").read_text().split() == [
        *("prepare", "my.toml", "data.seed=1", "--ray", "auto")
    ]
    started, stopped = (found / "ray").read_text().splitlines()
    assert started == "token start --head --port=20007 --num-cpus=4" and stopped == "token stop"
    assert (found / "requeued").exists() == requeued


@pytest.fixture
def array_task(tmp_path):
    """Runs a task of an array: its exit code, whether it was requeued, and the words of `moma`."""
    found = tmp_path / "found"
    found.mkdir()

    def run(moma: str, task: int, first: int, step: int, is_stopped=False):
        options = "--ntasks=1 --cpus-per-task=4"
        srun = f'#!/bin/bash\n[ "$1 $2" = "{options}" ] || exit 2\nexec "${{@:3}}"\n'
        moma = f'#!/bin/bash\necho "$@" > "$FOUND/moma"\n{moma}\n'
        write_programs(tmp_path, scontrol=SCONTROL, srun=srun, moma=moma)
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "FOUND": str(found),
            "TMPDIR": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_CPUS_PER_TASK": "4",
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_MIN": str(first),
            "SLURM_ARRAY_TASK_STEP": str(step),
            "SLURM_ARRAY_TASK_COUNT": "16",
        }
        script = [str(LAUNCH / "slurm_prepare.sbatch"), "my.toml", "data.remote=s3://a/b"]
        process = subprocess.Popen(["bash", *script], env=environment, start_new_session=True)
        if is_stopped:
            while not (found / "ready").exists():
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGTERM)
        code = process.wait(60)
        words = (found / "moma").read_text().split()
        assert not Path(words[-3].removeprefix("data.path=")).exists()
        return code, (found / "requeued").exists(), words

    return run


@pytest.mark.parametrize(
    ("code", "expected", "requeued"), [(0, 0, False), (2, 2, False), (74, 0, True)]
)
def test_a_task_of_an_array_prepares_its_share(array_task, tmp_path, code, expected, requeued):
    *ended, words = array_task(f"exit {code}", task=3, first=0, step=1)
    assert ended == [expected, requeued]
    *before, path, option, share = words
    assert before == ["prepare", "my.toml", "data.remote=s3://a/b"]
    assert (option, share) == ("--share", "4/16")
    assert path.startswith(f"data.path={tmp_path}/")


def test_the_tasks_of_an_array_with_steps_are_counted(array_task):
    _, _, words = array_task("exit 0", task=5, first=1, step=2)
    assert words[-1] == "3/16"


def test_a_task_of_an_array_that_is_out_of_time_is_requeued(array_task):
    stopped = "trap 'exit 75' TERM; echo > \"$FOUND/ready\"; sleep 60 & wait; exit 9"
    code, requeued, _ = array_task(stopped, task=3, first=0, step=1, is_stopped=True)
    assert (code, requeued) == (0, True)


@pytest.mark.parametrize(
    ("code", "restarts", "expected", "requeued"),
    [
        (0, 0, 0, False),
        (2, 0, 2, False),
        (75, 99, 0, True),
        (143, 99, 0, True),
        (74, 2, 0, True),
        (74, 3, 1, False),
    ],
)
def test_a_job_of_an_array_trains_runs_of_a_study(tmp_path, code, restarts, expected, requeued):
    stop = "kill -TERM $PPID" if code in (75, 143) else ""  # the script gets it, too
    write_programs(
        tmp_path,
        scontrol=SCONTROL,
        srun='#!/bin/bash\n[ "$1 $2" = "--ntasks=1 --cpus-per-task=4" ] || exit 9\nexec "${@:3}"\n',
        moma=f'#!/bin/bash\nprintf "%s\\n" "$@" > "$FOUND/called"\n{stop}\nexit {code}\n',
    )
    environment = {"SLURM_RESTART_COUNT": str(restarts), "MAX_FAILURES": "3"}
    script = ("slurm_study.sbatch", "my.toml", "study.seeds=[0, 1]")
    done = run_as_job(tmp_path, environment | {"FOUND": str(tmp_path)}, *script)
    assert done.returncode == expected
    assert (tmp_path / "called").read_text() == "study\nmy.toml\nstudy.seeds=[0, 1]\n"
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.fixture(scope="module")
def ray_cluster():
    return yaml.safe_load((LAUNCH / "ray.yaml").read_text())


def test_the_ray_cluster_file_has_keys_and_values_of_ray(ray_cluster):
    jsonschema, ray = pytest.importorskip("jsonschema"), find_spec("ray")
    if ray is None or ray.origin is None:
        pytest.skip("needs Ray")
    for node_type in ray_cluster["available_node_types"].values():
        node_type["resources"] = {}  # which Ray asks the provider for
    schema = Path(ray.origin).parent / "autoscaler/ray-schema.json"
    jsonschema.validate(ray_cluster, json.loads(schema.read_text()))
    assert ray_cluster["head_node_type"] in ray_cluster["available_node_types"]


def test_machines_of_a_ray_cluster_install_the_repository(ray_cluster, tmp_path):
    """The shell expands the home folder, and commands of the environment are found afterwards."""
    python = "#!/bin/bash\nmkdir -p $3/bin && cp $HOME/pip $HOME/ray $3/bin\n"
    programs = {name: f'#!/bin/bash\necho "{name} $@" >> $HOME/called\n' for name in ("pip", "ray")}
    write_programs(tmp_path, python3=python, **programs)
    environment = os.environ | {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    commands = [*ray_cluster["setup_commands"], ". ~/.bashrc; command -v ray > ~/found"]
    for command in commands:
        subprocess.run(["bash", "-c", command], env=environment, check=True)
    installed = f"pip install -c {tmp_path}/moma/constraints.txt -e {tmp_path}/moma[ray]\n"
    assert (tmp_path / "called").read_text() == installed
    assert (tmp_path / "found").read_text() == f"{tmp_path}/venv/bin/ray\n"
