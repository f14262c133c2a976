"""A tiny model of random weights, and a server of it."""

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

from moma.generate.mixed import MixedModel
from moma.generate.settings import Settings
from moma.generate.stream import Content
from moma.images import png_bytes
from moma.model.routing import ROUTINGS
from moma.model.transformer import ModelConfig, Transformer
from moma.serve.answer import Answer
from moma.serve.app import Limits, create_app
from moma.serve.connection import server_config
from moma.serve.engine import Engine
from moma.serve.server import listen
from moma.vocabulary import Vocabulary
from tests.factories import make_tokenizers

CONTEXT = 64


def make_mixed(folder: Path, context: int = CONTEXT) -> MixedModel:
    """A model whose images have 4 codes and 16 × 16 pixels."""
    tokenizers = make_tokenizers(folder, block_channels=[8, 16])
    config = ModelConfig(dim=32, layers=2, heads=2, groups="moe_2t2i")
    model = Transformer(config, Vocabulary.load(tokenizers.vocabulary), (0.5, 0.5))
    model.initialize(0)
    model.causal_routing = ROUTINGS["auxiliary"]
    return MixedModel.assemble(model.eval(), tokenizers, context)


def make_never_ending(folder: Path) -> MixedModel:
    """A model with a long context that never ends a document at temperature 0."""
    mixed = make_mixed(folder, context=20_000)
    with torch.no_grad():
        mixed.model.head.weight[mixed.model.vocabulary.end] = 0  # another logit is positive
    return mixed


def noise(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def comparable(content: Sequence[Content]) -> list[object]:
    """Content as text and pixel values."""
    return [part if isinstance(part, str) else np.asarray(part).tolist() for part in content]


def ask(
    engine: Engine, prompt: Sequence[Content], settings: Settings, has_rows: bool = False
) -> Answer:
    """The answer of an engine to one request."""
    return engine.submit(prompt, [settings], has_rows)[0]


def png_url(image: Image.Image) -> str:
    """An image as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}"


def read_url(url: str) -> Image.Image:
    """The image of a data URL of a PNG file."""
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@contextmanager
def running(
    engine: Engine,
    limits: Limits | None = None,
    token: str | None = None,
    mount: Callable[[FastAPI], object] | None = None,
) -> Iterator[str]:
    """The endpoint of an engine on a loopback address, with `model` as the model's name.

    `mount` may add something to the app.
    """
    app = create_app(engine, "model", limits or Limits(), token)
    if mount is not None:
        mount(app)
    with serving(app) as url:
        yield url


@contextmanager
def serving(app: Any, **options: Any) -> Iterator[str]:
    """An app on a loopback address; options as for `server_config`."""
    with listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(server_config(app, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for something that other threads bring about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
