import json

import pytest
import torch
from PIL import Image

from moma.tokenizers.image.codec import CodecConfig, ImageCodec, to_pil
from moma.tokenizers.image.log import CodecLog, in_two_rows, reconstruct, side_by_side
from moma.tokenizers.image.metrics import measure_codec
from moma.tokenizers.image.train import CodecTrainingConfig, train_codec

SHAPE = CodecConfig(
    image_size=16,
    patch=8,
    block_channels=(8,),
    layers_per_block=1,
    latent_channels=8,
    code_channels=8,
    codebook_size=8,
    norm_groups=4,
    middle_attention=False,
    encoder_middle=False,
)
TRAINING = CodecTrainingConfig(
    steps=8,
    batch_size=4,
    warmup_steps=2,
    quantizer_start_step=2,
    save_every=3,
    log_every=2,
    measure_every=4,
)


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return list(torch.rand(10, 3, 16, 16, generator=draw) * 2 - 1)


def rows_in(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_hold_losses_and_what_the_codec_achieves(images, tmp_path):
    log = CodecLog(tmp_path, images[5:], images[:5])
    codec = train_codec(SHAPE, TRAINING, images[5:], log=log)
    rows = rows_in(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert all(
        {"loss", "absolute_error", "commitment", "learning_rate"} <= row.keys() for row in rows
    )
    assert [row["step"] for row in rows if "psnr" in row] == [4, 8]
    assert rows[-1]["psnr"] == measure_codec(codec, images[:5]).psnr
    use = measure_codec(codec, images[5:])
    assert (rows[-1]["codes_used"], rows[-1]["perplexity"]) == (use.codes_used, use.perplexity)
    assert rows[-1]["images"] == 5
    assert "adversarial" not in rows[-1]


def test_after_an_interruption_the_log_is_that_of_an_uninterrupted_training(images, tmp_path):
    class InterruptionError(Exception):
        pass

    class Interrupting(CodecLog):
        def __call__(self, report, codec):
            super().__call__(report, codec)
            if report.step == 8:
                raise InterruptionError

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_codec(SHAPE, TRAINING, images, folder=whole, log=CodecLog(whole, images))
    with pytest.raises(InterruptionError):
        train_codec(SHAPE, TRAINING, images, folder=broken, log=Interrupting(broken, images))
    # The state is that of step 6; the log has a row of step 8, and a torn one.
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    train_codec(SHAPE, TRAINING, images, folder=broken, log=CodecLog(broken, images))
    assert rows_in(broken) == rows_in(whole)


def test_samples_are_originals_above_reconstructions(images, tmp_path):
    codec = train_codec(SHAPE, TRAINING, images, log=CodecLog(tmp_path, images))
    files = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert files == ["step-00000004.png", "step-00000008.png"]
    with Image.open(tmp_path / "samples" / files[-1]) as sheet:
        # Ten images, evenly thinned out to five of them.
        assert sheet.size == (5 * 20 + 4, 2 * 20 + 4)
        assert sheet.crop((24, 4, 40, 20)).tobytes() == to_pil(images[2]).tobytes()
        reconstructions_B3HW = codec.decode(codec.encode(torch.stack(images[2:3])))
        assert sheet.crop((24, 24, 40, 40)).tobytes() == to_pil(reconstructions_B3HW[0]).tobytes()


def test_images_stand_side_by_side():
    black, white = -torch.ones(3, 5, 7), torch.ones(3, 5, 7)
    both = side_by_side(black, white)
    assert both.size == (18, 5)
    assert both.getpixel((6, 4)) == (0, 0, 0)
    assert both.getpixel((11, 0)) == (255, 255, 255)
    sheet = in_two_rows(torch.stack([black, white]), torch.stack([white, black]))
    assert sheet.getpixel((5, 5)) == sheet.getpixel((20, 14)) == (0, 0, 0)


def test_reconstruction_in_parts_is_that_of_all_at_once(images, monkeypatch):
    torch.manual_seed(0)
    codec = ImageCodec(SHAPE).eval()
    batch_B3HW = torch.stack(images)
    expected = codec.decode(codec.encode(batch_B3HW))
    monkeypatch.setattr("moma.tokenizers.image.codec._PIXELS_AT_ONCE", 3 * 16 * 16)
    assert codec.images_at_once == 3
    torch.testing.assert_close(reconstruct(codec, batch_B3HW), expected)


def test_large_images_are_taken_a_few_at_a_time(images, monkeypatch):
    with torch.device("meta"):
        assert ImageCodec(CodecConfig()).images_at_once == 16
    codecs = []
    for pixels in (2**22, 4 * 16 * 16):
        monkeypatch.setattr("moma.tokenizers.image.codec._PIXELS_AT_ONCE", pixels)
        torch.manual_seed(0)
        codec = ImageCodec(SHAPE)
        codec.start_codebook(torch.stack(images))
        codecs.append(codec.codebook)
    torch.testing.assert_close(*codecs)
