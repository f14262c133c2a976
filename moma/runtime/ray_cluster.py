"""The connection to a Ray cluster."""

import socket
from typing import Any

from moma.errors import UserError

_SECONDS_TO_CONNECT = 30


def connect_to_ray(address: str, **options: Any) -> Any:
    """Connect this process to a Ray cluster, and return the module `ray`.

    Args:
        address: of the cluster; "auto" for the one that this machine belongs to.
        options: of `ray.init`.

    Raises:
        UserError: Ray is not installed, or no cluster at the address accepts this process.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray needs Ray; run pip install 'moma[ray]'") from error
    try:
        if ":" in address and "/" not in address:
            _require_listener(address)
        ray.init(address, **options)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise UserError(
            f"--ray {address}: no Ray cluster there that accepts this process; start one with "
            "`ray start --head`; for a cluster that asks for a token, set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN unless the token is in ~/.ray/auth_token"
        ) from error
    return ray


def _require_listener(address: str) -> None:
    """Raise `ConnectionError` if nothing listens at `HOST:PORT`, where Ray tries for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_CONNECT).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConnectionError(f"{address}: {error}") from error
