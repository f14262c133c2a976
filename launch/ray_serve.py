"""Replicas of `moma serve` behind one address, under Ray Serve.

    python launch/ray_serve.py runs/my --replicas 4 --gpus 1

Every replica holds the whole model, on GPUs of its own. Requests go to the replicas that have the
fewest; one that fails is started anew. This process stands before them: it sends a request again
that a lost replica has not begun to answer. Start it on the head node of a cluster. Options that
are not here are those of `moma serve`.
"""

from pathlib import Path
from typing import Annotated, Any

import ray
import uvicorn
from ray import serve
from typer import Option

import moma
from moma.cli.arguments import App, RunFolder
from moma.runtime.ray_cluster import connect_to_ray
from moma.serve.app import Limits, create_app
from moma.serve.connection import server_config
from moma.serve.engine import Engine
from moma.serve.forward import forwarding_app
from moma.serve.guard import read_token
from moma.serve.server import listen

app = App()


@serve.ingress()
class Replica:
    """An engine with its endpoint."""

    def __init__(self, run: str, name: str, token: str | None, places: dict[str, int]):
        self._engine = Engine(moma.load(run), **places)
        self._engine.__enter__()
        self._name, self._token = name, token

    def __serve_build_asgi_app__(self) -> Any:
        """Return the endpoint."""
        return create_app(self._engine, self._name, Limits(), self._token)

    def check_health(self) -> None:
        """Let Ray replace this replica if its engine has failed."""
        if reason := self._engine.stopped:
            raise RuntimeError(reason)


@app.command()
def main(
    run: RunFolder,
    replicas: Annotated[int, Option(min=1, help="number of replicas")] = 1,
    gpus: Annotated[float, Option(min=0, help="GPUs of each replica")] = 0,
    cpus: Annotated[float, Option(min=0, help="CPU cores of each replica")] = 1,
    ray_address: Annotated[
        str, Option("--ray", help="address of a Ray cluster; local: one of this machine")
    ] = "local",
    host: Annotated[str, Option(help="any but a loopback address needs a token")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535)] = 8000,
    token_file: Annotated[
        Path | None, Option(help="file with the token that clients send, or MOMA_TOKEN")
    ] = None,
    max_active: Annotated[int, Option(min=1, help="requests of a replica at a time")] = 8,
    max_queued: Annotated[int, Option(min=0, help="requests that wait at a replica")] = 64,
) -> None:
    """Serve a run by several replicas until Ctrl-C."""
    token = read_token(token_file, host)
    path = run.resolve()
    with listen("127.0.0.1", 0) as free:
        inner = free.getsockname()[1]
    listener = listen(host, port)
    connect_to_ray(ray_address, include_dashboard=False)
    try:
        serve.start("HeadOnly", http_options={"host": "127.0.0.1", "port": inner})
        places = {"max_active": max_active, "max_queued": max_queued}
        deployment = serve.deployment(
            Replica,
            name="moma",
            num_replicas=replicas,
            ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
            max_ongoing_requests=max_active + max_queued,
            health_check_period_s=2,
        )
        serve.run(deployment.bind(str(path), path.name, token, places))
        app = forwarding_app(f"http://127.0.0.1:{inner}", Limits(), token)
        server = uvicorn.Server(server_config(app, timeout_graceful_shutdown=10))
        print(f"http://{host}:{port}/v1", flush=True)
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    app()
