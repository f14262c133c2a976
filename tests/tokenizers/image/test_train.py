import math
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moma.data.encode.prepare import encode_images
from moma.errors import StoppedError, UserError
from moma.tokenizers.image import train as image_training
from moma.tokenizers.image.batches import order_of_batches
from moma.tokenizers.image.codec import CodecConfig, ImageCodec, to_pil
from moma.tokenizers.image.losses import AdversarialConfig, PerceptualConfig
from moma.tokenizers.image.metrics import measure_codec
from moma.tokenizers.image.train import CodecProgress, CodecTrainingConfig, train_codec
from tests.hub.foreign import random_vgg

SHAPE = CodecConfig(
    image_size=16,
    patch=4,
    block_channels=(16,),
    layers_per_block=1,
    latent_channels=8,
    code_channels=8,
    codebook_size=16,
    norm_groups=4,
    middle_attention=False,
    encoder_middle=False,
)
TRAINING = CodecTrainingConfig(
    steps=12, batch_size=4, warmup_steps=2, quantizer_start_step=4, save_every=5, log_every=5
)
EVERYTHING = TRAINING.model_copy(
    update={
        "ema_decay": 0.9,
        "precision": "bfloat16",
        "adversarial": AdversarialConfig(weight=0.5, start_step=6, width=4, layers=1),
    }
)


@pytest.fixture(autouse=True)
def one_thread():
    """Layers this small are slower on several threads, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    """Two-coloured images: easy to learn, unlike each other."""
    draw = torch.Generator().manual_seed(0)
    colours = torch.rand(30, 3, 2, 1, generator=draw) * 2 - 1
    return list(colours.repeat_interleave(8, 2).expand(30, 3, 16, 16))


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(random_vgg(), file)
    return file


def same(one: ImageCodec, two: ImageCodec) -> bool:
    other = two.state_dict()
    return all(torch.equal(value, other[name]) for name, value in one.state_dict().items())


def test_training_depends_on_the_seed_alone(images):
    first, again, other = (train_codec(SHAPE, TRAINING, images, seed=seed) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)
    assert not first.training


def test_training_leaves_the_random_numbers_of_its_caller_alone(images):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_codec(SHAPE, TRAINING, images)
    assert torch.equal(torch.rand(1), expected)


def interrupted(config, images, folder, stop):
    """Training that was stopped after step `stop` and then went on."""

    class InterruptionError(Exception):
        pass

    def interrupt(report: CodecProgress) -> None:
        # The report of a step comes before its save, so the state of `stop` is what is left.
        if report.step > stop:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        train_codec(SHAPE, config, images, folder=folder, progress=interrupt)
    reports: list[CodecProgress] = []
    resumed = train_codec(SHAPE, config, images, folder=folder, progress=reports.append)
    assert reports[0].step == stop + 1
    return resumed


# Before the codebook starts, at that step, and long after it.
@pytest.mark.parametrize("stop", [3, 4, 10])
def test_interrupted_training_ends_like_uninterrupted_training(images, tmp_path, stop):
    config = TRAINING.model_copy(update={"save_every": stop, "log_every": 1})
    resumed = interrupted(config, images, tmp_path, stop)
    assert same(resumed, train_codec(SHAPE, config, images))
    finished = train_codec(SHAPE, config, images, folder=tmp_path)
    assert same(resumed, finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_finished_step_and_training_resumes(images, tmp_path, number, request):
    handler = signal.getsignal(signal.SIGTERM)  # ignored after the stop, for launchers
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, handler))

    def stop(report: CodecProgress) -> None:
        if report.step == 7:
            os.kill(os.getpid(), number)

    config = TRAINING.model_copy(update={"save_every": 12, "log_every": 1})
    with pytest.raises(StoppedError, match=rf"{number.name} after step 7, which is saved"):
        train_codec(SHAPE, config, images, folder=tmp_path, progress=stop)
    reports: list[CodecProgress] = []
    resumed = train_codec(SHAPE, config, images, folder=tmp_path, progress=reports.append)
    assert reports[0].step == 8
    assert same(resumed, train_codec(SHAPE, config, images))


# Before the discriminator takes part, and after.
@pytest.mark.parametrize("stop", [5, 9])
def test_interrupted_training_with_everything_on_ends_the_same(images, tmp_path, vgg_file, stop):
    perceptual = PerceptualConfig(weights=vgg_file, weight=0.1)
    changes = {"save_every": stop, "log_every": 1, "perceptual": perceptual}
    config = EVERYTHING.model_copy(update=changes)
    resumed = interrupted(config, images, tmp_path, stop)
    assert same(resumed, train_codec(SHAPE, config, images))


def test_the_plain_training_has_the_losses_it_had(images):
    """The demo's codec is trained this way; figures of one machine, so not to the last digit."""
    reports: list[CodecProgress] = []
    config = TRAINING.model_copy(update={"steps": 40, "log_every": 20})
    train_codec(SHAPE, config, images, progress=reports.append)
    assert [report.loss for report in reports] == pytest.approx([0.84769, 0.64133], rel=1e-3)
    assert [report.commitment for report in reports] == pytest.approx(
        [0.004902, 0.006276], rel=0.01
    )
    assert {reports[1].perceptual, reports[1].adversarial, reports[1].discriminator} == {None}


def test_the_average_is_that_of_the_weights_of_every_step(images):
    config = TRAINING.model_copy(update={"quantizer_start_step": 0, "measure_every": 1})
    seen: list[dict[str, torch.Tensor]] = []

    def keep(report: CodecProgress, codec: ImageCodec | None) -> None:
        assert codec is not None and not codec.training
        seen.append({name: weight.detach().clone() for name, weight in codec.named_parameters()})

    last = train_codec(SHAPE, config, images, log=keep)
    averaged = train_codec(SHAPE, config.model_copy(update={"ema_decay": 0.6}), images)
    assert len(seen) == config.steps
    for name, weight in averaged.named_parameters():
        expected = seen[0][name]
        for count, weights in enumerate(seen[1:], 1):
            share = min(0.6, (1 + count) / (10 + count))
            expected = share * expected + (1 - share) * weights[name]
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(averaged.codebook, last.codebook)
    assert not same(averaged, last)


def test_the_discriminator_takes_part_from_its_step_on(images):
    reports: list[CodecProgress] = []
    config = EVERYTHING.model_copy(update={"log_every": 1})
    train_codec(SHAPE, config, images, progress=reports.append)
    told = [(r.adversarial is not None, r.discriminator is not None) for r in reports]
    assert told == [(False, False)] * 6 + [(True, True)] * 6


def test_bfloat16_learns_nearly_the_same_and_leaves_weights_in_full(images):
    config = TRAINING.model_copy(update={"steps": 60, "learning_rate": 5e-3})
    reduced = config.model_copy(update={"precision": "bfloat16"})
    full, half = (train_codec(SHAPE, c, images) for c in (config, reduced))
    assert {value.dtype for value in half.state_dict().values()} == {torch.float32, torch.bool}
    assert not same(full, half)
    assert measure_codec(half, images).psnr > measure_codec(full, images).psnr - 2


def test_on_a_cpu_the_automatic_precision_is_full(images):
    full = TRAINING.model_copy(update={"precision": "float32"})
    assert same(train_codec(SHAPE, TRAINING, images), train_codec(SHAPE, full, images))


def test_reports_and_codecs_are_logged_when_they_are_due(images):
    calls: list[tuple[int, bool]] = []
    config = TRAINING.model_copy(update={"measure_every": 4})
    logged = train_codec(
        SHAPE, config, images, log=lambda report, codec: calls.append((report.step, bool(codec)))
    )
    # Step 4 is the last without a codebook.
    assert calls == [(4, False), (5, False), (8, True), (10, False), (12, True)]
    assert same(logged, train_codec(SHAPE, TRAINING, images))


def test_a_codec_without_a_decoder_cannot_be_trained(images):
    with pytest.raises(UserError, match=r"codec\.decoder = false"):
        train_codec(SHAPE.model_copy(update={"decoder": False}), TRAINING, images)


def test_a_state_of_another_training_or_a_torn_one_is_refused(images, tmp_path):
    train_codec(SHAPE, TRAINING, images, folder=tmp_path)
    with pytest.raises(UserError, match="another configuration"):
        train_codec(SHAPE, TRAINING, images, seed=1, folder=tmp_path)
    with pytest.raises(UserError, match="another configuration"):
        train_codec(SHAPE, TRAINING, images[:-1], folder=tmp_path)
    (state,) = tmp_path.iterdir()
    state.write_bytes(b"torn")
    with pytest.raises(UserError, match="delete it"):
        train_codec(SHAPE, TRAINING, images, folder=tmp_path)
    save_file({"a": torch.zeros(1)}, state)
    with pytest.raises(UserError, match="another configuration"):
        train_codec(SHAPE, TRAINING, images, folder=tmp_path)


def test_training_learns_and_uses_the_codebook(images):
    config = TRAINING.model_copy(
        update={"steps": 120, "quantizer_start_step": 40, "batch_size": 8, "learning_rate": 5e-3}
    )
    reports: list[CodecProgress] = []
    codec = train_codec(SHAPE, config, images, progress=reports.append)
    assert reports[-1].step == config.steps
    assert reports[-1].loss < 0.5 * reports[0].loss
    before = measure_codec(train_codec(SHAPE, TRAINING, images), images)
    after = measure_codec(codec, images)
    assert after.psnr > before.psnr + 3
    assert after.codes_used > 0.8


def test_bytes_and_floats_are_the_same_images(images):
    coded = [((image + 1) * 127.5).round().to(torch.uint8) for image in images]
    floats = [image.float() / 255 * 2 - 1 for image in coded]
    assert same(train_codec(SHAPE, TRAINING, coded), train_codec(SHAPE, TRAINING, floats))


def test_every_image_is_drawn_once_an_epoch_and_order_continues_anywhere():
    whole = order_of_batches(10, 4, 0, seed=3)
    batches = [next(whole) for _ in range(5)]
    drawn = [index for batch in batches for index in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert next(order_of_batches(10, 4, 3, seed=3)) == batches[3]


def test_the_learning_rate_rises_and_falls():
    config = TRAINING.model_copy(update={"steps": 100, "warmup_steps": 10})
    rates = [image_training._learning_rate(config, step) for step in range(100)]
    assert rates[9] == rates[10] == config.learning_rate == max(rates)
    assert rates[0] == pytest.approx(config.learning_rate / 10)
    assert rates[99] < 0.02 * config.learning_rate


def test_no_images_is_an_error():
    with pytest.raises(UserError, match="no images"):
        train_codec(SHAPE, TRAINING, [])


@pytest.mark.gpu
def test_a_gpu_trains_in_bfloat16_and_encodes_in_batches(images, tmp_path):
    """A few steps with everything on, gone on with from the state, and codes of all images."""
    device = torch.device("cuda")
    training = EVERYTHING.model_copy(update={"precision": "auto", "steps": 8})
    reports: list[CodecProgress] = []

    def train():
        return train_codec(
            SHAPE, training, images, device=device, folder=tmp_path, progress=reports.append
        )

    codec = train()
    assert codec.codebook.device.type == "cuda"
    assert {value.dtype for value in codec.parameters()} == {torch.float32}
    assert all(value.isfinite().all() for value in codec.state_dict().values())
    assert reports[-1].step == 8 and math.isfinite(reports[-1].loss)
    again = train()  # nothing is left to do
    assert len(reports) == 2 and same(codec, again)
    pixels = [np.asarray(to_pil(image)) for image in images]
    codes = encode_images(codec, device, pixels)
    assert codes.shape == (len(images), SHAPE.codes_per_image) and codes.dtype == np.int64
    alone = np.concatenate([encode_images(codec, device, [one]) for one in pixels])
    # Another size of batch may take another kernel: a code that lies between two may differ.
    assert (codes == alone).mean() > 0.98
