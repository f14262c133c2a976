"""The log of a codec's training: `metrics.jsonl` and sheets of samples."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from moma.runs import Run
from moma.tokenizers.image import ImageCodec, to_pil
from moma.tokenizers.image_training import CodecProgress, evenly, measure_codec

_MEASURED_PICTURES = 256
_SAMPLES = 8
_GAP = 4


class CodecLog:
    """Writes a row for every report, measures the codec and draws samples when it is shown one."""

    def __init__(self, folder: Path, pictures: Sequence[Tensor]):
        """Go on with the log in a folder, or start one.

        Args:
            folder: gets `metrics.jsonl` and `samples/step-00000500.png`, ….
            pictures: what to measure and draw; best pictures that training does not see.
        """
        self._folder, self._pictures = folder, pictures
        self._file = Run(folder).metrics
        self._started = False

    def __call__(self, report: CodecProgress, codec: ImageCodec | None) -> None:
        """Log a report; with a codec also what it achieves."""
        row = {key: value for key, value in asdict(report).items() if value is not None}
        del row["steps"]
        if codec is not None:
            row |= asdict(measure_codec(codec, self._pictures, most=_MEASURED_PICTURES))
            self._draw(codec, report.step)
        if not self._started:
            self._drop_from(report.step)
            self._started = True
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _drop_from(self, step: int) -> None:
        """Drop rows of steps that are done again, as after an interruption."""
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = Run(self._folder).read_metrics() if self._file.exists() else []
        partial = self._file.with_suffix(".partial")
        partial.write_text("".join(json.dumps(r) + "\n" for r in rows if r["step"] < step))
        partial.replace(self._file)

    def _draw(self, codec: ImageCodec, step: int) -> None:
        indices = evenly(len(self._pictures), _SAMPLES)
        originals_B3HW = torch.stack([self._pictures[index] for index in indices])
        folder = self._folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        sheet = in_two_rows(originals_B3HW, reconstruct(codec, originals_B3HW))
        sheet.save(folder / f"step-{step:08d}.png")


def reconstruct(codec: ImageCodec, pictures_B3HW: Tensor) -> Tensor:
    """Pictures through the codec and back, a few at a time; on the CPU."""
    device = codec.codebook.device
    parts = pictures_B3HW.split(codec.pictures_at_once)
    return torch.cat([codec.decode(codec.encode(part.to(device))).cpu() for part in parts])


def in_two_rows(originals_B3HW: Tensor, reconstructions_B3HW: Tensor) -> Image.Image:
    """Originals above, reconstructions below."""
    count, _, height, width = originals_B3HW.shape
    size = (count * (width + _GAP) + _GAP, 2 * (height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    for row, pictures_B3HW in enumerate((originals_B3HW, reconstructions_B3HW)):
        for column, picture_3HW in enumerate(pictures_B3HW):
            place = (_GAP + column * (width + _GAP), _GAP + row * (height + _GAP))
            sheet.paste(to_pil(picture_3HW), place)
    return sheet


def side_by_side(original_3HW: Tensor, reconstruction_3HW: Tensor) -> Image.Image:
    """The original at the left, the reconstruction at the right."""
    _, height, width = original_3HW.shape
    sheet = Image.new("RGB", (2 * width + _GAP, height), "white")
    sheet.paste(to_pil(original_3HW), (0, 0))
    sheet.paste(to_pil(reconstruction_3HW), (width + _GAP, 0))
    return sheet
