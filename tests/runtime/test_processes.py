"""Worker processes: how they start, what interrupts them, and when they end."""

import os
import signal
import subprocess
import sys

import pytest

from moma.runtime.processes import start_pool
from tests.runtime.killed_parent import assert_workers_end_with_parent

SCRIPT = """
print("started", flush=True)
from moma.runtime.processes import start_pool
with start_pool(1) as pool:
    print(pool.submit(abs, -3).result())
import __main__
assert __main__.pool is pool
"""


@pytest.mark.skipif(not os.path.exists("/proc"), reason="looks processes up")
def test_workers_of_a_pool_end_when_their_parent_is_killed():
    code = """
from moma.runtime.processes import start_pool
pool = start_pool(2)
pool.submit(int).result()
"""
    assert_workers_end_with_parent(code, 2)


def test_workers_leave_interrupts_to_their_parent():
    with start_pool(1) as pool:
        worker = pool.submit(os.getpid).result()
        os.kill(worker, signal.SIGINT)
        assert pool.submit(os.getpid).result() == worker


def test_starting_workers_does_not_run_the_users_script_again(tmp_path):
    script = tmp_path / "script.py"  # without `if __name__ == "__main__"`
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.stdout, done.stderr) == ("started\n3\n", "")
