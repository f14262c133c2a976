"""Training of the image codec: deterministic, exact after an interruption, each key used."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from moma.data.encode.worker import encode_images
from moma.errors import StoppedError, UserError
from moma.runtime.world import World
from moma.tokenizers.image.codec import ImageCodec, to_pil
from moma.tokenizers.image.metrics import measure_codec
from moma.tokenizers.image.train import batch_indices, train_codec
from tests.factories import codec_config
from tests.tokenizers.image.training import (
    ADVERSARIAL,
    EVERYTHING,
    IMAGES,
    SHAPE,
    config,
    plain,
    same,
    train,
    with_everything,
)


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
