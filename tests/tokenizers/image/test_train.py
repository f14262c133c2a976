"""Training of the image codec: deterministic, exact after an interruption, each key used."""

import json
import math
import os
import signal
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moma.data.encode.worker import encode_images
from moma.errors import StoppedError, UserError
from moma.runtime.world import World
from moma.tokenizers.image.codec import ImageCodec, to_pil
from moma.tokenizers.image.metrics import measure_codec
from moma.tokenizers.image.train import CodecTrainingConfig, batch_indices, train_codec
from tests.factories import codec_config, two_colored_images
from tests.hub.foreign import random_vgg

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


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(random_vgg(), file)
    return file


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


def test_the_result_depends_only_on_the_seed():
    again, other = (train_codec(SHAPE, config(), IMAGES, seed=seed) for seed in (0, 1))
    assert same(plain(), again)
    assert not same(plain(), other)
    assert not again.training


def test_golden_losses():
    """The demo's codec is trained this way; a machine may differ in the last digits."""
    found: list[dict] = []
    wider = codec_config(block_channels=[16])
    train_codec(wider, config(steps=40, log_every=20), IMAGES, progress=found.append)
    assert [record["loss"] for record in found] == pytest.approx([0.84769, 0.64133], rel=1e-3)
    expected = pytest.approx([0.004902, 0.006276], rel=0.01)
    assert [record["commitment"] for record in found] == expected
    assert not {"perceptual", "adversarial", "discriminator"} & found[1].keys()


def test_the_random_state_of_the_caller_is_unchanged():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train(steps=1)
    assert torch.equal(torch.rand(1), expected)


# Interruptions


class KilledError(Exception):
    """Represents a kill: nothing in the program catches it."""


def resume_after_kill(folder: Path, stop: int, **changes) -> ImageCodec:
    """Kill a training after step `stop` + 1, when its checkpoint is of `stop`; then resume it."""
    training = config(**changes, save_every=stop, log_every=1)

    def kill(record):
        if record["step"] > stop:
            raise KilledError

    with pytest.raises(KilledError):
        train_codec(SHAPE, training, IMAGES, folder=folder, progress=kill)
    found: list[dict] = []
    resumed = train_codec(SHAPE, training, IMAGES, folder=folder, progress=found.append)
    assert found[0]["step"] == stop + 1
    return resumed


# Before the codebook starts, at that step, and later.
@pytest.mark.parametrize("stop", [3, 4, 10])
def test_a_resumed_training_ends_like_an_uninterrupted_one(tmp_path, stop):
    resumed = resume_after_kill(tmp_path, stop)
    assert same(resumed, plain())
    finished = train_codec(SHAPE, config(save_every=stop), IMAGES, folder=tmp_path)
    assert same(finished, plain())


# Before the first step of the discriminator, and after.
@pytest.mark.parametrize("stop", [5, 9])
def test_a_training_with_every_loss_resumes_exactly(tmp_path, stop):
    resumed = resume_after_kill(tmp_path, stop, **EVERYTHING)
    assert same(resumed, with_everything())


def test_a_training_with_the_perceptual_loss_resumes_exactly(tmp_path, vgg_file):
    values = {
        "steps": 3,
        "batch_size": 1,
        "quantizer_start_step": 1,
        "perceptual": {"weights": vgg_file, "weight": 0.1},
        "adversarial": ADVERSARIAL | {"start_step": 1},
    }
    assert same(resume_after_kill(tmp_path, 2, **values), train(**values))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_finished_step_and_training_resumes(tmp_path, number, request):
    handler = signal.getsignal(signal.SIGTERM)  # ignored after the stop, for launchers
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, handler))

    def stop(record):
        if record["step"] == 7:
            os.kill(os.getpid(), number)

    training = config(save_every=12, log_every=1)
    with pytest.raises(StoppedError, match=rf"{number.name} after step 7, which is saved"):
        train_codec(SHAPE, training, IMAGES, folder=tmp_path, progress=stop)
    found: list[dict] = []
    resumed = train_codec(SHAPE, training, IMAGES, folder=tmp_path, progress=found.append)
    assert found[0]["step"] == 8
    assert same(resumed, plain())


def test_a_folder_of_another_training_is_refused(tmp_path):
    train_codec(SHAPE, config(), IMAGES, folder=tmp_path)
    for seed, images in ((1, IMAGES), (0, IMAGES[:-1])):
        with pytest.raises(UserError, match="another configuration, seed or set of images"):
            train_codec(SHAPE, config(), images, seed=seed, folder=tmp_path)
    with pytest.raises(UserError, match="another configuration"):
        train_codec(SHAPE, config(mse_weight=2), IMAGES, folder=tmp_path)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_used(tmp_path, caplog):
    train_codec(SHAPE, config(), IMAGES, folder=tmp_path)
    older, newest = sorted((tmp_path / "checkpoints").glob("step-*"))
    for path in newest.glob("tensors/*"):
        path.write_bytes(b"torn")
    assert same(train_codec(SHAPE, config(), IMAGES, folder=tmp_path), plain())
    assert (tmp_path / "checkpoints" / f"{newest.name}.damaged").is_dir()
    for path in (older, newest):
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"every checkpoint is damaged.*delete"):
        train_codec(SHAPE, config(), IMAGES, folder=tmp_path)


# Keys


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


# Images


def test_bytes_and_floats_are_the_same_images():
    coded = [((image + 1) * 127.5).round().to(torch.uint8) for image in IMAGES]
    floats = [image.float() / 255 * 2 - 1 for image in coded]
    assert same(train(coded, steps=5), train(floats, steps=5))


def test_every_image_is_used_once_per_epoch():
    used = [index for step in range(5) for index in batch_indices(10, 4, step, seed=3)]
    assert sorted(used[:10]) == sorted(used[10:]) == list(range(10))
    assert used[:10] != used[10:]
    assert batch_indices(10, 20, 0, seed=3) == used


def test_training_without_images_or_decoder_is_refused():
    with pytest.raises(UserError, match="no images"):
        train([])
    with pytest.raises(UserError, match=r"codec\.decoder = false"):
        train_codec(codec_config(decoder=False), config(), IMAGES)


# The folder


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_log_has_losses_and_the_quality_of_the_codec(tmp_path):
    training = config(log_every=5, measure_every=4)
    codec = train_codec(SHAPE, training, IMAGES[5:], IMAGES[:5], folder=tmp_path)
    found = log_of(tmp_path)
    # Step 4 is the last without a codebook.
    assert [(r["step"], "psnr" in r) for r in found] == [
        (4, False),
        (5, False),
        (8, True),
        (10, False),
        (12, True),
    ]
    losses = {"step", "loss", "absolute_error", "commitment", "learning_rate"}
    assert losses == found[0].keys()
    metrics = measure_codec(codec, IMAGES[5:], IMAGES[:5]).model_dump()
    assert {key: found[-1][key] for key in metrics} == metrics
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step-00000008.png",
        "step-00000012.png",
    ]
    assert same(codec, train(IMAGES[5:]))


def test_checkpoints_are_written_when_they_are_due(tmp_path):
    train_codec(SHAPE, config(save_every=5), IMAGES, folder=tmp_path)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-00000010", "step-00000012"]


def test_the_log_of_a_resumed_training_is_that_of_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    training = config(save_every=3, log_every=2)

    def kill(record):
        if record["step"] == 8:
            raise KilledError

    train_codec(SHAPE, training, IMAGES, folder=whole)
    with pytest.raises(KilledError):
        train_codec(SHAPE, training, IMAGES, folder=killed, progress=kill)
    # The checkpoint is that of step 6; the log has a record of step 8, and an incomplete one.
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    train_codec(SHAPE, training, IMAGES, folder=killed)
    assert log_of(killed) == log_of(whole)


@pytest.mark.gpu
def test_a_gpu_trains_in_bfloat16_and_encodes_in_batches(tmp_path):
    """A few steps with every loss, a resumed run, and codes of all images."""
    device = torch.device("cuda")
    training = config(**EVERYTHING | {"precision": "auto", "steps": 8})
    found: list[dict] = []

    def train_on_gpu():
        return train_codec(
            SHAPE, training, IMAGES, world=World(device), folder=tmp_path, progress=found.append
        )

    codec = train_on_gpu()
    assert codec.codebook.device.type == "cuda"
    assert {value.dtype for value in codec.parameters()} == {torch.float32}
    assert all(value.isfinite().all() for value in codec.state_dict().values())
    assert found[-1]["step"] == 8 and math.isfinite(found[-1]["loss"])
    again = train_on_gpu()  # nothing remains to be done
    assert len(found) == 2 and same(codec, again)
    pixels = [np.asarray(to_pil(image)) for image in IMAGES]
    codes = encode_images(codec, device, pixels)
    assert codes.shape == (len(IMAGES), SHAPE.codes_per_image) and codes.dtype == np.int64
    one_by_one = np.concatenate([encode_images(codec, device, [one]) for one in pixels])
    # Another batch size may select another kernel: a code between two vectors may differ.
    assert (codes == one_by_one).mean() > 0.98
