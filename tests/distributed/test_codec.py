"""Codec training on two gloo processes equals that on one, also when it resumes on another number.

Adam enlarges differences of rounding, so the learning rate is small.
"""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from moma.errors import SharedError, StoppedError, UserError
from moma.runtime.world import World
from moma.tokenizers.image.codec import ImageCodec
from moma.tokenizers.image.train import CodecTrainingConfig, train_codec
from tests.factories import codec_config, two_colored_images
from tests.processes import on_ranks

SHAPE = codec_config(codebook_size=32)
TRAINING = CodecTrainingConfig.model_validate(
    {
        "steps": 8,
        "batch_size": 4,
        "learning_rate": 1e-4,
        "warmup_steps": 2,
        "quantizer_start_step": 2,
        "log_every": 1,
        "measure_every": 4,
        "save_every": 4,
        "ema_decay": 0.9,
        "adversarial": {"weight": 0.5, "start_step": 3, "width": 4, "layers": 1},
    }
)
IMAGES = two_colored_images()


class KilledError(Exception):
    """Represents a kill."""


def train(world: World, folder: Path, stop: int | None = None) -> None:
    def kill(record):
        if record["step"] == stop:
            raise KilledError

    try:
        codec = train_codec(
            SHAPE, TRAINING, IMAGES, IMAGES, world=world, folder=folder, progress=kill
        )
    except KilledError:
        return
    codec.save(folder / f"rank-{world.rank}")


def train_until(world: World, folder: Path, stop: int) -> None:
    """Train on all ranks until a step whose checkpoint is complete, and stop by a signal."""

    def interrupt(record):
        if record["step"] == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        train_codec(SHAPE, TRAINING, IMAGES, IMAGES, world=world, folder=folder, progress=interrupt)


def refuse_uneven(world: World) -> None:
    uneven = TRAINING.model_copy(update={"batch_size": 3})
    with pytest.raises(UserError, match=r"batch_size = 3: must be a multiple of the 2 ranks"):
        train_codec(SHAPE, uneven, IMAGES, world=world)


def fail_on_rank_1(world: World) -> None:
    class Images(list[torch.Tensor]):
        def __getitem__(self, index):
            if world.rank == 1:
                raise UserError("an image cannot be read")
            return IMAGES[index]

    with pytest.raises(SharedError, match="an image cannot be read"):
        train_codec(SHAPE, TRAINING, Images(IMAGES), world=world)


def diverge_on_rank_1(world: World, folder: Path) -> None:
    class Images(list[torch.Tensor]):
        def __getitem__(self, index):
            image = IMAGES[index].float()
            return image * torch.nan if world.rank == 1 else image

    with pytest.raises(SharedError, match=f"not finite.*delete {folder} and lower"):
        train_codec(SHAPE, TRAINING, Images(IMAGES), world=world, folder=folder)


def weights(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return ImageCodec.load(folder / f"rank-{rank}").state_dict()


def records(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def assert_equal(one: Path, other: Path) -> None:
    torch.testing.assert_close(weights(other), weights(one), rtol=1e-3, atol=1e-4)
    for expected, found in zip(records(one), records(other), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train(World(torch.device("cpu")), folder)
    return folder


def test_two_ranks_train_as_one(one_process, tmp_path):
    on_ranks(2, train, tmp_path)
    torch.testing.assert_close(weights(tmp_path), weights(tmp_path, rank=1), rtol=0, atol=0)
    assert_equal(one_process, tmp_path)
    samples = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert samples == sorted(path.name for path in (one_process / "samples").iterdir())


def test_two_ranks_resume_what_one_began_and_the_reverse(one_process, tmp_path):
    alone = World(torch.device("cpu"))
    train(alone, tmp_path / "first", stop=6)
    on_ranks(2, train, tmp_path / "first")
    assert_equal(one_process, tmp_path / "first")
    on_ranks(2, train_until, tmp_path / "second", 5)
    train(alone, tmp_path / "second")
    assert_equal(one_process, tmp_path / "second")


def test_what_one_rank_refuses_stops_both(tmp_path):
    on_ranks(2, refuse_uneven)
    on_ranks(2, fail_on_rank_1)
    on_ranks(2, diverge_on_rank_1, tmp_path)
