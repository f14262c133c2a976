import math

import pytest
import torch

from moma.errors import UserError
from moma.tokenizers import image_training
from moma.tokenizers.image import CodecConfig, ImageCodec
from moma.tokenizers.image_training import (
    CodecProgress,
    CodecTrainingConfig,
    measure_codec,
    train_codec,
)

SHAPE = CodecConfig(
    picture_size=16,
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
    steps=12, batch_size=4, warmup_steps=2, free_steps=4, save_every=5, log_every=5
)


@pytest.fixture(autouse=True)
def one_thread():
    """Layers this small are slower on several threads, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures() -> list[torch.Tensor]:
    """Two-coloured pictures: easy to learn, unlike each other."""
    draw = torch.Generator().manual_seed(0)
    colours = torch.rand(30, 3, 2, 1, generator=draw) * 2 - 1
    return list(colours.repeat_interleave(8, 2).expand(30, 3, 16, 16))


def same(one: ImageCodec, two: ImageCodec) -> bool:
    other = two.state_dict()
    return all(torch.equal(value, other[name]) for name, value in one.state_dict().items())


def test_training_depends_on_the_seed_alone(pictures):
    first, again, other = (train_codec(SHAPE, TRAINING, pictures, seed=seed) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)
    assert not first.training


def test_training_leaves_the_random_numbers_of_its_caller_alone(pictures):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_codec(SHAPE, TRAINING, pictures)
    assert torch.equal(torch.rand(1), expected)


# Before the codebook starts, at that step, and long after it.
@pytest.mark.parametrize("stop", [3, 4, 10])
def test_interrupted_training_ends_like_uninterrupted_training(pictures, tmp_path, stop):
    class InterruptionError(Exception):
        pass

    def interrupt(report: CodecProgress) -> None:
        # The report of a step comes before its save, so the state of `stop` is what is left.
        if report.step > stop:
            raise InterruptionError

    config = TRAINING.model_copy(update={"save_every": stop, "log_every": 1})
    with pytest.raises(InterruptionError):
        train_codec(SHAPE, config, pictures, folder=tmp_path, progress=interrupt)
    reports: list[CodecProgress] = []
    resumed = train_codec(SHAPE, config, pictures, folder=tmp_path, progress=reports.append)
    assert reports[0].step == stop + 1
    assert same(resumed, train_codec(SHAPE, config, pictures))
    finished = train_codec(SHAPE, config, pictures, folder=tmp_path)
    assert same(resumed, finished)


def test_a_state_of_another_training_or_a_torn_one_is_refused(pictures, tmp_path):
    train_codec(SHAPE, TRAINING, pictures, folder=tmp_path)
    with pytest.raises(UserError, match="another configuration"):
        train_codec(SHAPE, TRAINING, pictures, seed=1, folder=tmp_path)
    with pytest.raises(UserError, match="another configuration"):
        train_codec(SHAPE, TRAINING, pictures[:-1], folder=tmp_path)
    (state,) = tmp_path.iterdir()
    state.write_bytes(b"torn")
    with pytest.raises(UserError, match="delete it"):
        train_codec(SHAPE, TRAINING, pictures, folder=tmp_path)


def test_training_learns_and_uses_the_codebook(pictures):
    config = TRAINING.model_copy(
        update={"steps": 120, "free_steps": 40, "batch_size": 8, "learning_rate": 5e-3}
    )
    reports: list[CodecProgress] = []
    codec = train_codec(SHAPE, config, pictures, progress=reports.append)
    assert reports[-1].step == config.steps
    assert reports[-1].loss < 0.5 * reports[0].loss
    before = measure_codec(train_codec(SHAPE, TRAINING, pictures), pictures)
    after = measure_codec(codec, pictures)
    assert after.psnr > before.psnr + 3
    assert after.codes_used > 0.8


def test_bytes_and_floats_are_the_same_pictures(pictures):
    coded = [((picture + 1) * 127.5).round().to(torch.uint8) for picture in pictures]
    floats = [picture.float() / 255 * 2 - 1 for picture in coded]
    assert same(train_codec(SHAPE, TRAINING, coded), train_codec(SHAPE, TRAINING, floats))


def test_measures_agree_with_a_direct_computation(pictures):
    codec = train_codec(SHAPE, TRAINING, pictures)
    metrics = measure_codec(codec, pictures, batch_size=7)
    batch_B3HW = torch.stack(pictures)
    codes_BL = codec.encode(batch_B3HW)
    error = (codec.decode(codes_BL) - batch_B3HW).square().mean().item()
    assert metrics.psnr == pytest.approx(10 * math.log10(4 / error), rel=1e-4)
    shares = [(codes_BL == code).double().mean().item() for code in codes_BL.unique()]
    assert metrics.codes_used == len(shares) / SHAPE.codebook_size
    entropy = -sum(share * math.log(share) for share in shares)
    assert metrics.perplexity == pytest.approx(math.exp(entropy))
    assert metrics.pictures == len(pictures)


def test_every_picture_is_drawn_once_an_epoch_and_order_continues_anywhere():
    whole = image_training._order(10, 4, 0, seed=3)
    batches = [next(whole) for _ in range(5)]
    drawn = [index for batch in batches for index in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert next(image_training._order(10, 4, 3, seed=3)) == batches[3]


def test_the_learning_rate_rises_and_falls():
    config = TRAINING.model_copy(update={"steps": 100, "warmup_steps": 10})
    rates = [image_training._learning_rate(config, step) for step in range(100)]
    assert rates[9] == rates[10] == config.learning_rate == max(rates)
    assert rates[0] == pytest.approx(config.learning_rate / 10)
    assert rates[99] < 0.02 * config.learning_rate


def test_no_pictures_is_an_error(pictures):
    with pytest.raises(UserError, match="no pictures"):
        train_codec(SHAPE, TRAINING, [])
    with pytest.raises(UserError, match="no pictures"):
        measure_codec(ImageCodec(SHAPE), [])
