"""The server before replicas, when one of them is lost; and connections that send no request."""

import asyncio
import socket
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import ClientDisconnect

from moma.serve.app import Limits
from moma.serve.forward import forwarding_app
from tests.serve.models import serving, wait_until

JSON = [(b"content-type", b"application/json")]


class Replicas:
    """An ASGI app that loses the first requests, in different ways."""

    def __init__(self):
        self.lost = 0
        self.bodies: list[bytes] = []
        self.hung_up = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        self.bodies.append((await receive())["body"])
        path, start = scope["path"], {"type": "http.response.start", "status": 200}
        self.lost -= 1
        if path == "/endless":
            await send(start | {"headers": [(b"content-type", b"text/event-stream")]})
        if path in ("/slow", "/endless"):
            assert (await asyncio.wait_for(receive(), 20))["type"] == "http.disconnect"
            self.hung_up += 1
            return
        if path == "/stream":
            await send(start | {"headers": [(b"content-type", b"text/event-stream")]})
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        elif self.lost >= 0 and path == "/status":
            await send(start | {"status": 500, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"Internal Server Error"})
            return
        elif self.lost >= 0:
            await send(start | {"headers": [*JSON, (b"content-length", b"100")]})
            await send({"type": "http.response.body", "body": b"{", "more_body": True})
        if path == "/stream" or self.lost >= 0:
            raise ConnectionError("killed")
        await send(start | {"headers": JSON})
        await send({"type": "http.response.body", "body": b'{"answer": 1}'})


@pytest.fixture(scope="module")
def replicas():
    return Replicas()


@pytest.fixture(scope="module")
def url(replicas):
    with serving(replicas) as inner:
        app = forwarding_app(inner, Limits(body_bytes=50), pause=0.001)
        with serving(app) as url:
            yield url


@pytest.mark.parametrize("path", ["/status", "/cut"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_request_is_sent_again(replicas, url, path, lost):
    replicas.lost, replicas.bodies = lost, []
    answer = httpx.post(url + path, json={"a": 1})
    assert (answer.status_code, answer.json()) == (200, {"answer": 1})
    assert replicas.bodies == [b'{"a":1}'] * (lost + 1)


@pytest.mark.parametrize("path", ["/status", "/cut"])
def test_a_request_that_ends_its_replica_does_not_end_all(replicas, url, path):
    replicas.lost, replicas.bodies = 1000, []
    assert httpx.post(url + path, json={}).status_code == 503
    assert len(replicas.bodies) == 2


def test_requests_do_not_go_to_the_proxy_of_the_environment(replicas, monkeypatch):
    replicas.lost = 0
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(replicas) as inner, serving(forwarding_app(inner, Limits(), pause=0)) as url:
        assert httpx.get(f"{url}/x", trust_env=False).json() == {"answer": 1}


def test_a_path_that_is_no_url_is_not_found(url):
    address = url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), 10) as connection:
        connection.sendall(b"GET //x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 404")


def test_errors_have_the_shape_that_clients_expect(replicas, url):
    replicas.lost = 1000
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    with pytest.raises(openai.APIStatusError, match="replica that answered is lost") as raised:
        client.post("/status", cast_to=object, body={})
    assert raised.value.status_code == 503 and raised.value.code == "replica_lost"
    with pytest.raises(openai.APIStatusError, match="larger than 50 bytes"):
        client.post("/status", cast_to=object, body={"long": "a" * 60})


def test_a_stream_that_is_lost_ends_with_an_error(url):
    answer = httpx.post(f"{url}/stream", json={})
    first, second = answer.text.strip().split("\n\n")
    assert first == "data: {}" and '"code": "replica_lost"' in second


def test_a_client_that_hangs_up_ends_its_request(replicas, url):
    before = replicas.hung_up
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/slow", json={}, timeout=0.2)
    wait_until(lambda: replicas.hung_up == before + 1, 10)


def test_a_client_that_is_gone_before_a_stream_begins_ends_it(replicas):
    before = replicas.hung_up
    messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive():
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message):
        raise OSError("gone")

    async def call(app):
        scope: dict[str, Any] = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "POST"}
        scope |= {
            "path": "/endless",
            "query_string": b"",
            "headers": [(b"host", b"127.0.0.1"), *JSON],
        }
        with pytest.raises((ClientDisconnect, RuntimeError)):
            await app(scope, receive, send)
        # The loop goes on, as that of a server.
        await asyncio.to_thread(wait_until, lambda: replicas.hung_up == before + 1, 10)

    with serving(replicas) as inner:
        asyncio.run(call(forwarding_app(inner, Limits())))


def test_the_token_is_asked_for_before_a_request_is_passed_on(replicas):
    with serving(forwarding_app("http://127.0.0.1:9", Limits(), "a token of many letters")) as url:
        assert httpx.get(f"{url}/v1/models").json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET /x HTTP/1.1\r\nHost: a\r\n"])
def test_a_connection_that_sends_no_request_is_closed(replicas, sent):
    with serving(replicas, head_seconds=0.05) as url:
        address = url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), 10) as connection:
            connection.sendall(sent)
            assert connection.recv(100) == b""


def test_the_second_request_of_a_connection_must_arrive_in_time_too(replicas):
    replicas.lost = 0
    with serving(replicas, head_seconds=0.05) as url:
        address = url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), 10) as connection:
            connection.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"200 OK" in connection.recv(1000)
            connection.sendall(b"GET /x HT")
            while connection.recv(1000):
                pass
