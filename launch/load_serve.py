"""Throughput of a running `moma serve` for 1 and for many clients, in turn.

    python launch/load_serve.py http://127.0.0.1:8000/v1 --mode image --clients 16

Every client sends its next request when the last one is answered (`pip install openai`).
"""

import statistics
import threading
import time
from typing import Annotated, Any, Literal

import openai
import typer
from typer import Argument, Option

from moma.cli.arguments import App

app = App()


@app.command()
def main(
    url: Annotated[str, Argument(help="what `moma serve` prints")],
    mode: Annotated[Literal["text", "image"], Option()] = "text",
    prompt: Annotated[str, Option()] = "a red circle",
    clients: Annotated[int, Option(min=2)] = 16,
    requests: Annotated[int, Option(min=1, help="of each client")] = 4,
    tokens: Annotated[int, Option(min=1, help="new tokens of each answer")] = 100,
    rounds: Annotated[int, Option(min=1)] = 3,
    api_key: Annotated[str, Option(envvar="MOMA_TOKEN")] = "none",
) -> None:
    """Print tokens per second, seconds to the first piece and per answer, and their ratio."""
    client = openai.OpenAI(base_url=url, api_key=api_key, timeout=600)
    model = client.models.list().data[0].id
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": tokens,
        "extra_body": {"mode": mode},
    }
    measure(client, body, 1, 1)
    speeds: dict[int, list[float]] = {1: [], clients: []}
    for _ in range(rounds):
        for count, found in speeds.items():
            found.append(measure(client, body, count, requests))
    ratios = [many / one for one, many in zip(speeds[1], speeds[clients], strict=True)]
    typer.echo(f"{clients} clients have {statistics.median(ratios):.2f} × the throughput of 1")


def measure(client: Any, body: dict[str, Any], clients: int, requests: int) -> float:
    """Return new tokens per second of some clients."""
    tokens: list[int] = []
    firsts: list[float] = []
    wholes: list[float] = []

    def send(number: int) -> None:
        for request in range(requests):
            begin, first, usage = time.perf_counter(), None, None
            for chunk in client.chat.completions.create(**body, seed=number * requests + request):
                if first is None and chunk.choices and has_content(chunk.choices[0].delta):
                    first = time.perf_counter() - begin
                usage = chunk.usage or usage
            wholes.append(time.perf_counter() - begin)
            firsts.append(wholes[-1] if first is None else first)
            tokens.append(usage.completion_tokens)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    speed = sum(tokens) / (time.perf_counter() - begin)
    typer.echo(
        f"{clients:3} clients: {speed:7.1f} tokens/s, {len(wholes)} answers, median seconds to the "
        f"first piece {statistics.median(firsts):.2f}, to the end {statistics.median(wholes):.2f}"
    )
    return speed


def has_content(delta: Any) -> bool:
    """Whether a piece of an answer has text or images."""
    return bool(delta.content) or bool(getattr(delta, "images", None))


if __name__ == "__main__":
    app()
