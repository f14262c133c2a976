"""Bad requests, limits, tokens and clients that hang up: clear errors, and no place is lost."""

import json
import socket
import threading
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moma.serve.app import Limits
from moma.serve.engine import Engine
from moma.serve.errors import to_api_error
from moma.serve.requests import ChatBody
from tests.serve.models import make_mixed, noise, png_url, running, wait_until

TOKEN = "a token of many characters"
CHAT, IMAGES = "/v1/chat/completions", "/v1/images/generations"
GOOD: dict[str, Any] = {
    "model": "model",
    "messages": [{"role": "user", "content": "the"}],
    "max_tokens": 2,
}
LONG = GOOD | {"mode": "text", "temperature": 0, "max_tokens": 19_000}
CLIENT_LONG = LONG | {"stream": True, "extra_body": {"mode": LONG["mode"]}}
del CLIENT_LONG["mode"]


@pytest.fixture(scope="module")
def http(mixed):
    limits = Limits(body_bytes=20_000, pixels=400, tokens=40)
    with (
        Engine(mixed) as engine,
        running(engine, limits) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        yield http


def with_url(url):
    return {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
        ]
    }


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "unknown parameter"),
        ({"tools": []}, "tools", "unknown parameter"),
        ({"frequency_penalty": 1.0}, "frequency_penalty", "less than or equal to 0"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": None}, "messages", "valid array"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "a"}]}]}, "messages.0.content.0", ""),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 65}, "n", "less than or equal to 64"),
        ({"n": "2"}, "n", "valid integer"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "valid array"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
         "messages.0.content.0.text", "valid string"),
        ({"messages": [GOOD["messages"][0] | {"str": 1}]}, "messages.0.str", "unknown parameter"),
        ({"stop": [1]}, "stop.0", "valid string"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"max_tokens": 41}, "max_tokens", "at most 40 for an answer"),
        ({"max_completion_tokens": 3}, "max_tokens", "give one"),
        ({"mode": "image", "images": 7, "max_tokens": None}, "images", "need 42 tokens"),
        ({"mode": "image", "max_tokens": 5}, None, "at most 5 new tokens: an image has 6"),
        ({"stop": [""]}, None, "empty string would end every answer"),
        ({"mode": "image", "stop": "a"}, None, "no effect with mode 'image'"),
        ({"text_guidance": 3.0}, None, "guidance applies to images only"),
        ({"temperature": -1.0}, None, "temperature -1.0: must be"),
        ({"top_p": 1e-50}, None, "top_p 1e-50: must be"),
        ({"images": 2}, None, "needs mode 'image'"),
        ({"messages": [{"role": "user", "content": "zzz " * 99}]}, None, "context of 64 tokens"),
        ({"messages": [{"role": "user", "content": "z" * 9_000}]}, None, "context of 64 tokens"),
        (with_url("http://127.0.0.1/a.png"), "messages.0.content.0.image_url.url", "not fetched"),
        (with_url("file:///etc/passwd"), "messages.0.content.0.image_url.url", "not fetched"),
        (with_url("data:image/png;base64,#"), "messages.0.content.0.image_url.url", "base64"),
        (with_url("data:image/png;base64,aaaa"), None, "cannot read the image"),
        (with_url(png_url(noise(1, (21, 20)))), None, "21 × 20 pixels are more than"),
    ],
)  # fmt: skip
def test_a_bad_request_gets_a_clear_error(http, changes, param, message):
    error = error_of(http.post(CHAT, json=GOOD | changes), 400)
    assert message in error["message"] and "Traceback" not in error["message"]
    assert param is None or error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "512x512"}, "this model draws images of 16x16"),
        ({"response_format": "url"}, "b64_json"),
        ({"quality": "hd"}, "unknown parameter"),
        ({"mode": "text"}, "unknown parameter"),
    ],
)
def test_a_bad_request_for_images_gets_a_clear_error(http, changes, message):
    body = {"model": "model", "prompt": "red"} | changes
    assert message in error_of(http.post(IMAGES, json=body), 400)["message"]


def test_other_paths_methods_and_types_are_refused(http):
    error_of(http.get("/v1/nothing"), 404)
    error_of(http.get(CHAT), 405)
    error_of(http.post(CHAT, content=json.dumps(GOOD)), 415)
    for body in ("", "{", "[1]", "nul", '{"a": NaN}', "[" * 9_000, '"\\ud800"', b"\xff"):
        error_of(http.post(CHAT, content=body, headers={"content-type": "application/json"}), 400)


def test_a_large_body_is_refused_before_it_is_read(http):
    headers = {"content-type": "application/json"}
    body = b" " * 20_001
    assert "20000 bytes" in error_of(http.post(CHAT, content=body, headers=headers), 413)["message"]
    sent = []

    def endless():
        while True:
            sent.append(1)
            yield b" " * 10_000

    with suppress(httpx.TransportError):  # the server closes the connection
        error_of(http.post(CHAT, content=endless(), headers=headers), 413)
    assert len(sent) < 10_000


PARTS = [{"type": "text", "text": ""}]


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"messages": [1] * 10_000}, "messages.0", "an object"),
        ({"messages": GOOD["messages"] * 4097}, "messages", "at most 4096"),
        ({"messages": [{"role": "user", "content": [1] * 10_000}]}, "messages.0.content.0", ""),
        ({"messages": [{"role": "user", "content": PARTS * 4097}]}, "messages.0.content",
         "at most 4096"),
        ({"stop": [1] * 10_000}, "stop.0", "valid string"),
        ({f"a{number}": 1 for number in range(10_000)}, "a0", "unknown parameter"),
        ({"stream_options": {f"a{number}": 1 for number in range(10_000)}}, "stream_options.a0",
         "unknown parameter"),
    ],
)  # fmt: skip
def test_only_the_first_of_many_errors_is_looked_for(changes, param, message):
    with pytest.raises(ValidationError) as caught:
        ChatBody.model_validate_json(json.dumps(GOOD | changes))
    assert caught.value.error_count() <= 2
    error = to_api_error(caught.value)
    assert error.param == param and message in str(error)


def test_a_slow_body_is_refused(mixed):
    with Engine(mixed) as engine, running(engine, Limits(body_seconds=0.05)) as url:
        port = int(url.rsplit(":")[-1])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
            assert b"408" in connection.recv(1000).split(b"\r\n")[0]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda each: (
        st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = (
    *("messages", "model", "n", "seed", "stop", "temperature", "top_p", "top_k", "min_p", "mode"),
    *("max_tokens", "stream", "stream_options", "text_guidance", "user", "images", "other"),
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=2), st.booleans())
def test_no_request_is_a_defect_of_the_server(http, changes, is_whole):
    body = changes if is_whole else GOOD | changes
    response = http.post(CHAT, json=body)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error_of(response, response.status_code)


def test_a_full_server_asks_to_try_again(never_ending):
    with (
        Engine(never_ending, max_active=1, max_queued=1) as engine,
        running(engine) as url,
        httpx.Client(base_url=url, timeout=60) as http,
        ExitStack() as streams,
    ):
        for _ in range(2):
            stream = http.stream("POST", CHAT, json=LONG | {"stream": True})
            assert streams.enter_context(stream).status_code == 200
        response = http.post(CHAT, json=LONG)
        assert error_of(response, 429)["code"] == "queue_full"
        assert response.headers["retry-after"] == "1"
        error_of(http.post(CHAT, json=LONG | {"n": 2}), 429)
        assert "moma_queued_requests 1.0" in http.get("/metrics").text
        streams.close()
        wait_until(lambda: engine.active + engine.queued == 0)
        assert http.post(CHAT, json=GOOD).status_code == 200
        text = http.get("/metrics").text
    assert 'moma_requests_total{path="/v1/chat/completions",status="429"} 2.0' in text
    assert 'moma_requests_total{path="/v1/chat/completions",status="200"} 3.0' in text
    assert "moma_time_to_first_token_seconds_count" in text
    assert f"moma_generated_tokens_total {float(engine.total_tokens)}" in text


def test_more_answers_than_the_server_takes_are_refused_for_good(mixed):
    with (
        Engine(mixed, max_active=1, max_queued=1) as engine,
        running(engine) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        assert "at most 2" in error_of(http.post(CHAT, json=GOOD | {"n": 3}), 400)["message"]
        assert len(http.post(CHAT, json=GOOD | {"n": 2}).json()["choices"]) == 2


def counted(url, path, status):
    return (
        f'moma_requests_total{{path="{path}",status="{status}"}} 1.0'
        in httpx.get(f"{url}/metrics").text
    )


def test_requests_of_clients_that_hang_up_and_defects_are_counted(never_ending, capfd):
    with Engine(never_ending, max_active=1) as engine, running(engine) as url:
        with httpx.Client(base_url=url) as http, pytest.raises(httpx.ReadTimeout):
            http.post(CHAT, json=LONG, timeout=0.3)
        wait_until(lambda: counted(url, CHAT, 499))
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":")[-1]))) as connection:
            head = f"POST {IMAGES} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
        wait_until(lambda: counted(url, IMAGES, 499))
        httpx.get(f"{url}/v1/models/model")
        assert counted(url, "/v1/models/{model}", 200)
        assert "ClientDisconnect" not in capfd.readouterr().err
        engine.submit = lambda *_: 1 / 0  # type: ignore
        error_of(httpx.post(f"{url}{CHAT}", json=GOOD), 500)
        assert counted(url, CHAT, 500)


def test_a_client_that_hangs_up_frees_its_place(never_ending):
    with Engine(never_ending, max_active=1) as engine, running(engine) as url:
        with httpx.Client(base_url=url) as http, pytest.raises(httpx.ReadTimeout):
            http.post(CHAT, json=LONG, timeout=1)
        wait_until(lambda: engine.active == 0)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        stream = client.chat.completions.create(**CLIENT_LONG)  # type: ignore[call-overload]
        next(iter(stream))
        stream.close()
        wait_until(lambda: engine.active == 0)


def test_a_token_is_required(mixed):
    with (
        Engine(mixed) as engine,
        running(engine, token=TOKEN) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        assert http.get("/health").json() == {"status": "ok"}
        for path in ("/metrics", "/v1/models", "/", "/nothing"):
            response = http.get(path)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"].startswith("Basic")
        for wrong in ("Bearer", f"Bearer {TOKEN}x", "Basic x", "Basic YTpi", TOKEN):
            error_of(http.get("/v1/models", headers={"authorization": wrong}), 401)
        assert http.get("/v1/models", auth=("anyone", TOKEN)).status_code == 200
        right = {"authorization": f"Bearer {TOKEN}"}
        assert http.get("/metrics", headers=right).status_code == 200


def test_without_a_token_only_loopback_names_are_answered(http):
    for host in ("localhost:80", "LOCALHOST", "127.0.0.1", "[::1]:8000", "[::1]"):
        assert http.get("/v1/models", headers={"host": host}).status_code == 200
    for host in ("evil.example", "192.168.0.1:80", "", "[::1].evil.example", "[::1"):
        error_of(http.get("/v1/models", headers={"host": host}), 403)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_engine_that_fails_says_so(tmp_path, streamed):
    mixed = make_mixed(tmp_path)
    mixed.model.register_forward_pre_hook(lambda *_: 1 / 0)
    with (
        Engine(mixed) as engine,
        running(engine) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.APIError, match="has failed; the server's log"):
            list(client.chat.completions.create(**GOOD, stream=streamed))  # type: ignore[call-overload]
        health = httpx.get(f"{url}/health")
        assert health.status_code == 503 and "ZeroDivision" not in health.text
        with pytest.raises(openai.InternalServerError, match="has failed; the server's log"):
            client.chat.completions.create(**GOOD)  # type: ignore[call-overload]


def test_a_stopping_server_ends_its_streams(never_ending):
    with Engine(never_ending) as engine, running(engine) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(**CLIENT_LONG)  # type: ignore[call-overload]
        next(iter(stream))
        stopper = threading.Timer(0.1, engine.stop)
        stopper.start()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        stopper.join()
