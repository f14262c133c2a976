"""Each key of the image codec's training changes its result, in the way that is documented."""

import math
from functools import cache

import pytest
import torch

from moma.tokenizers.image.codec import ImageCodec
from moma.tokenizers.image.metrics import measure_codec
from moma.tokenizers.image.train import train_codec
from tests.tokenizers.image.training import (
    ADVERSARIAL,
    IMAGES,
    SHAPE,
    config,
    plain,
    records,
    same,
    train,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 11},
        {"batch_size": 3},
        {"learning_rate": 2e-3},
        {"warmup_steps": 3},
        {"quantizer_start_step": 3},
        {"mse_weight": 2.0},
        {"gradient_clip": 1e-9},
        {"ema_decay": 0.5},
        {"precision": "bfloat16"},
        {"adversarial": ADVERSARIAL},
    ],
    ids=str,
)
def test_every_key_affects_the_result(changes):
    assert not same(train(**changes), plain())


@cache
def adversarial() -> ImageCodec:
    return train(adversarial=ADVERSARIAL)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": 1.0},
        {"start_step": 7},
        {"adaptive": False},
        {"width": 8},
        {"layers": 2},
        {"learning_rate": 1e-2},
    ],
    ids=str,
)
def test_every_key_of_the_discriminator_affects_the_result(changes):
    assert not same(train(adversarial=ADVERSARIAL | changes), adversarial())


def test_the_weight_of_the_perceptual_loss_affects_the_result(vgg_file):
    one, two = (
        train(steps=2, batch_size=1, perceptual={"weights": vgg_file, "weight": weight})
        for weight in (0.1, 0.2)
    )
    assert not same(one, two)


def test_the_learning_rate_rises_linearly_and_falls_by_a_cosine():
    found = records(steps=10, warmup_steps=2, learning_rate=8e-3, log_every=1, batch_size=1)
    expected = [4e-3, 8e-3]
    for step in range(8):
        expected.append(8e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * step / 8)) / 2))
    assert [record["learning_rate"] for record in found] == pytest.approx(expected)


def test_the_codebook_takes_part_from_its_step_on():
    found = records(log_every=1, quantizer_start_step=5, steps=7)
    assert [record["commitment"] > 0 for record in found] == [False] * 5 + [True] * 2


def test_the_discriminator_takes_part_from_its_step_on():
    found = records(log_every=1, steps=8, adversarial=ADVERSARIAL)
    for key in ("adversarial", "discriminator"):
        assert [key in record for record in found] == [False] * 6 + [True] * 2


def test_gradients_are_clipped_to_their_norm():
    """Adam hides the scale of gradients, unless they are as small as its epsilon."""
    first, clipped = (train(steps=1, gradient_clip=clip) for clip in (1.0, 1e-9))
    start = train(steps=1, learning_rate=1e-30)
    change, small = (
        sum((a - b).abs().sum().item() for a, b in zip(x.parameters(), y.parameters(), strict=True))
        for x, y in ((first, start), (clipped, start))
    )
    assert 0 < small < 0.1 * change


def test_the_average_is_that_of_the_weights_after_each_step():
    weights = [
        dict(train(steps=steps, learning_rate=1e-2, warmup_steps=100).named_parameters())
        for steps in range(1, 5)
    ]
    averaged = train(steps=4, learning_rate=1e-2, warmup_steps=100, ema_decay=0.25)
    for name, weight in averaged.named_parameters():
        expected = weights[0][name].detach()
        for count, after in enumerate(weights[1:], 1):
            share = min(0.25, (1 + count) / (10 + count))
            expected = share * expected + (1 - share) * after[name].detach()
        torch.testing.assert_close(weight.detach(), expected)


def test_bfloat16_learns_almost_the_same_and_keeps_weights_in_float32():
    values = {"steps": 30, "learning_rate": 5e-3}
    full, reduced = train(**values), train(**values, precision="bfloat16")
    assert {value.dtype for value in reduced.state_dict().values()} == {torch.float32, torch.bool}
    assert not same(full, reduced)
    assert measure_codec(reduced, IMAGES).psnr > measure_codec(full, IMAGES).psnr - 2


def test_the_automatic_precision_of_a_cpu_is_float32():
    assert same(plain(), train(precision="float32"))


def test_training_learns_and_uses_the_codebook():
    values = {"steps": 120, "quantizer_start_step": 40, "batch_size": 8, "learning_rate": 5e-3}
    found: list[dict] = []
    codec = train_codec(SHAPE, config(**values), IMAGES, progress=found.append)
    assert found[-1]["step"] == 120
    assert found[-1]["loss"] < 0.5 * found[0]["loss"]
    before, after = measure_codec(plain(), IMAGES), measure_codec(codec, IMAGES)
    assert after.psnr > before.psnr + 3
    assert after.codes_used > 0.8
