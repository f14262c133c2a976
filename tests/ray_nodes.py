"""A Ray cluster of two nodes, both on this machine."""

import os
import secrets
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

RAY = Path(sys.executable).with_name("ray")
# Of all clusters: a process that has connected to one keeps its token.
TOKEN = secrets.token_hex(32)


def own_environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@contextmanager
def two_nodes(folder):
    """Two nodes of one core, which share a secret with drivers; yields the address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        with _cluster(folder) as address:
            yield address


@contextmanager
def _cluster(folder):
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = own_environment()
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "300"}
    own = [f"--temp-dir={folder}", "--include-dashboard=false"]
    address = f"127.0.0.1:{port}"
    nodes: list[subprocess.Popen[bytes]] = []

    def start(*options):
        command = [str(RAY), "start", "--num-cpus=1", "--block", *options]
        command += ["--node-ip-address=127.0.0.1"]
        memory = ["--object-store-memory=80000000"]
        with (Path(folder) / f"node-{len(nodes)}.log").open("wb") as log:
            nodes.append(
                subprocess.Popen([*command, *memory], env=environment, stdout=log, stderr=log)
            )

    def wait():
        log = Path(folder) / f"node-{len(nodes) - 1}.log"
        for _ in range(1800):
            if "Ray runtime started" in log.read_text():
                return
            assert nodes[-1].poll() is None, log.read_text()
            time.sleep(0.1)

    try:
        start("--head", f"--port={port}", *own)
        wait()
        start(f"--address={address}")
        wait()
        yield address
    finally:
        for node in nodes[::-1]:
            node.terminate()
            node.wait()
