"""Two replicas under Ray Serve, one of them killed under load."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

import moma
from moma.generate.sampling import Sampling
from moma.generate.settings import Settings
from moma.serve.server import listen
from tests.serve.models import wait_until

LAUNCHER = Path(__file__).parents[2] / "launch" / "ray_serve.py"


def replicas(driver):
    """The processes of the replicas that a driver has started."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "ServeReplica" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.slow
def test_every_request_is_answered_or_gets_an_error_when_a_replica_is_killed(trained, tmp_path):
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    run, log = trained / "run", tmp_path / "log.txt"
    greedy = Settings("text", Sampling(temperature=0))
    (expected,) = moma.load(run).generate([["box 3"]], greedy)
    command = [sys.executable, str(LAUNCHER), str(run), "--replicas", "2", "--cpus", "0.5"]
    with (
        log.open("w") as output,
        subprocess.Popen([*command, "--port", str(port)], stdout=output, stderr=output) as driver,
    ):
        try:
            ready = re.compile(r"^http://.*/v1$", re.MULTILINE)
            wait_until(lambda: ready.search(log.read_text()) or driver.poll() is not None, 540)
            assert driver.poll() is None, log.read_text()
            results = use(f"http://127.0.0.1:{port}/v1", lambda: replicas(driver))
        finally:
            driver.send_signal(signal.SIGINT)
            try:
                driver.wait(60)
            except subprocess.TimeoutExpired:
                driver.kill()
    answers = [each for each in results if isinstance(each, str)]
    errors = [each for each in results if not isinstance(each, str)]
    print(f"{len(answers)} answers, {len(errors)} errors: {set(map(repr, errors))}")
    assert set(answers) == set(expected)
    # Requests of the lost replica are sent again.
    assert not errors


def use(url: str, find_replicas: Any) -> list[object]:
    """Send requests from several clients while a replica is killed, and return what they get."""
    results: list[object] = []
    killed = threading.Event()

    def send() -> None:
        client: Any = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        after = 0
        while after < 10:
            try:
                answer = client.chat.completions.create(
                    model="run",
                    messages=[{"role": "user", "content": "box 3"}],
                    temperature=0,
                    extra_body={"mode": "text"},
                )
                results.append(answer.choices[0].message.content)
            except openai.APIError as error:
                results.append(error)
            after += killed.is_set()

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(results) > 40, 120)
    before = find_replicas()
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    time.sleep(0.2)
    killed.set()
    for thread in threads:
        thread.join()
    wait_until(lambda: len(set(find_replicas()) - {before[0]}) == 2, 120)  # it is replaced
    return results
