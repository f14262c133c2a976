"""The connection to a Ray cluster: what is tried, and what is reported."""

import socket

import pytest

from moma.errors import UserError
from moma.runtime.ray_cluster import connect_to_ray


@pytest.mark.parametrize(("host", "written"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_a_port_that_listens_is_left_to_ray(monkeypatch, host, written):
    ray = pytest.importorskip("ray")
    addresses: list[str] = []
    monkeypatch.setattr(ray, "init", lambda address: addresses.append(address))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        server = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("no IPv6")
    with server:
        address = f"{written}:{server.getsockname()[1]}"
        assert connect_to_ray(address) is ray and addresses == [address]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "127.0.0.1:port", ":"])
def test_a_missing_cluster_is_reported_at_once(address):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=f"--ray {address}: no Ray cluster there"):
        connect_to_ray(address)
