"""Short trainings of a small image codec."""

from functools import cache

import torch

from moma.tokenizers.image.codec import ImageCodec
from moma.tokenizers.image.train import CodecTrainingConfig, train_codec
from tests.factories import codec_config, two_colored_images

SHAPE = codec_config()
TRAINING = {
    "steps": 12,
    "batch_size": 4,
    "warmup_steps": 2,
    "quantizer_start_step": 4,
    "save_every": 5,
    "log_every": 5,
}
ADVERSARIAL = {"weight": 0.5, "start_step": 6, "width": 4, "layers": 1}
EVERYTHING = {"ema_decay": 0.9, "precision": "bfloat16", "adversarial": ADVERSARIAL}
IMAGES = two_colored_images()


def config(**changes) -> CodecTrainingConfig:
    return CodecTrainingConfig.model_validate(TRAINING | changes)


def train(images=IMAGES, **changes) -> ImageCodec:
    return train_codec(SHAPE, config(**changes), images)


@cache
def plain() -> ImageCodec:
    """The result of `TRAINING`."""
    return train()


@cache
def with_everything() -> ImageCodec:
    """The result of `TRAINING` with every loss but the perceptual one."""
    return train(**EVERYTHING)


def records(images=IMAGES, **changes) -> list[dict]:
    found: list[dict] = []
    train_codec(SHAPE, config(**changes), images, progress=found.append)
    return found


def same(one: ImageCodec, two: ImageCodec) -> bool:
    other = two.state_dict()
    return all(torch.equal(value, other[name]) for name, value in one.state_dict().items())
