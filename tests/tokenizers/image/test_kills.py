"""Codec training that is killed at arbitrary moments ends like uninterrupted training."""

import random
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from moma.tokenizers.image.train import CodecTrainingConfig, train_codec
from tests.factories import codec_config, two_colored_images

IMAGES = two_colored_images()
TRAINING = CodecTrainingConfig.model_validate(
    {
        "steps": 80,
        "batch_size": 4,
        "quantizer_start_step": 10,
        "log_every": 2,
        "measure_every": 20,
        "save_every": 3,
        "ema_decay": 0.9,
        "adversarial": {"weight": 0.5, "start_step": 30, "width": 4, "layers": 1},
    }
)


def train(folder: Path) -> None:
    codec = train_codec(
        codec_config(), TRAINING, IMAGES[5:], IMAGES[:5], folder=folder / "training"
    )
    codec.save(folder / "codec")


def contents(folder: Path) -> dict[str, bytes]:
    files = [*folder.glob("codec/*"), *folder.glob("training/*.jsonl"), *folder.rglob("*.png")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def checkpoints_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "training" / "checkpoints").glob("step-*")}


@pytest.mark.slow
def test_kills_at_arbitrary_moments_change_no_byte(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole)
    draw, kills = random.Random(0), 0
    while not (killed / "codec" / "config.json").exists():
        process = get_context("fork").Process(target=train, args=(killed,))
        process.start()
        before = checkpoints_in(killed)
        while process.is_alive() and checkpoints_in(killed) == before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.2))
        if kills < 12 and process.is_alive():
            process.kill()
            kills += 1
        process.join()
    assert kills >= 8
    assert contents(killed) == contents(whole)
    assert len(contents(whole)) == 7  # two of the codec, the log, four samples
