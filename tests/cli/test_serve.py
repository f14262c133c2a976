"""`moma serve`: what it refuses; a server in a process of its own, and its signals."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

import moma
from moma.errors import UserError
from moma.generate.sampling import Sampling
from moma.generate.settings import Settings
from moma.serve.server import listen
from tests.command_line import refuses

MESSAGES: Any = [{"role": "user", "content": "box 3"}]


@pytest.fixture(autouse=True)
def _without_token(monkeypatch):
    monkeypatch.delenv("MOMA_TOKEN", raising=False)


def test_any_host_but_loopback_needs_a_token(trained, tmp_path, monkeypatch):
    serve = ("serve", trained / "run", "--no-page")  # so that Gradio is not imported
    assert "give --token-file or set MOMA_TOKEN" in refuses(*serve, "--host", "0.0.0.0")
    (tmp_path / "token").write_text("short\n")
    file = ("--token-file", tmp_path / "token")
    assert "token: a token has at least 16 ASCII" in refuses(*serve, *file)
    (tmp_path / "token").write_bytes(b"\xff" * 20)
    assert "token: is not text" in refuses(*serve, *file)
    assert "missing" in refuses(*serve, "--token-file", tmp_path / "missing")
    monkeypatch.setenv("MOMA_TOKEN", "two\nlines of sixteen")
    assert "MOMA_TOKEN: a token has" in refuses(*serve, "--host", "0.0.0.0")


def test_an_address_that_cannot_be_used_is_refused(trained):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refuses("serve", trained / "run", "--no-page", "--port", port)
    assert f"--host '127.0.0.1' --port {port}" in message and "choose another" in message
    for host in ("a\0b", "a" * 70):
        with pytest.raises(UserError, match="choose another"):
            listen(host, 0)


@contextmanager
def serving(run, *options, **environment):
    command = [sys.executable, "-m", "moma", "serve", str(run), "--port", "0", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.mark.slow
def test_a_server_answers_and_completes_its_requests_after_sigterm(trained):
    token = "a token of the test"
    greedy = Settings("text", Sampling(temperature=0))
    (expected,) = moma.load(trained / "run").generate([["box 3"]], greedy)
    with serving(trained / "run", "--name", "demo", MOMA_TOKEN=token) as (process, url):
        client = openai.OpenAI(base_url=url, api_key=token)
        stream = client.chat.completions.create(
            model="demo", messages=MESSAGES, temperature=0, stream=True, extra_body={"mode": "text"}
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        chunks: Any = stream
        pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
        assert ["".join(pieces)] == expected
        assert process.wait(60) == 0


@pytest.mark.slow
def test_ctrl_c_ends_a_server_cleanly(trained):
    with serving(trained / "run") as (process, url):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        threading.Timer(1, process.send_signal, (signal.SIGINT,)).start()
        try:
            for seed in range(10_000):
                client.chat.completions.create(model="run", messages=MESSAGES, seed=seed)
        except openai.APIError as error:
            assert "shutting down" in str(error) or isinstance(error, openai.APIConnectionError)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_an_open_page_does_not_keep_a_server_from_ending(trained):
    with serving(trained / "run") as (process, url):
        heartbeat = url.removesuffix("/v1") + "/page/gradio_api/heartbeat/session"
        with httpx.stream("GET", heartbeat, timeout=60) as stream:
            next(stream.iter_raw())
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
