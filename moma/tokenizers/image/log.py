"""The log of a codec's training: `metrics.jsonl` and sheets of samples."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from moma.files import atomic_replace, atomic_write, sync_file
from moma.runs import Run
from moma.tokenizers.image.codec import ImageCodec, to_pil
from moma.tokenizers.image.metrics import evenly, measure_trained
from moma.tokenizers.image.train import CodecProgress

_MEASURED_IMAGES = 256
_SAMPLES = 8
_GAP = 4


class CodecLog:
    """Writes a row for every report, measures the codec and draws samples when it is shown one."""

    def __init__(self, folder: Path, images: Sequence[Tensor], held_out: Sequence[Tensor] = ()):
        """Go on with the log in a folder, or start one.

        Args:
            folder: gets `metrics.jsonl` and `samples/step-00000500.png`, ….
            images: what training sees, for the use of codes.
            held_out: what it does not see, for the error and the samples; if there are none,
                `images` have to do.
        """
        self._folder, self._images, self._held_out = folder, images, held_out
        self._file = Run(folder).metrics
        self._started = False

    def __call__(self, report: CodecProgress, codec: ImageCodec | None) -> None:
        """Log a report; with a codec also what it achieves."""
        row = {key: value for key, value in asdict(report).items() if value is not None}
        del row["steps"]
        if codec is not None:
            measured = measure_trained(codec, self._images, self._held_out, _MEASURED_IMAGES)
            row |= asdict(measured)
            self._draw(codec, report.step)
        if not self._started:
            self._drop_from(report.step)
            self._started = True
        with self._file.open("ab") as file:
            file.write((json.dumps(row) + "\n").encode())
            sync_file(file)  # no later than the state that counts this step as done

    def _drop_from(self, step: int) -> None:
        """Drop rows of steps that are done again, as after an interruption."""
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = Run(self._folder).read_metrics() if self._file.exists() else []
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] < step)
        atomic_write(self._file, kept)

    def _draw(self, codec: ImageCodec, step: int) -> None:
        images = self._held_out if len(self._held_out) else self._images
        indices = evenly(len(images), _SAMPLES)
        originals_B3HW = torch.stack([images[index] for index in indices])
        folder = self._folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        sheet = in_two_rows(originals_B3HW, reconstruct(codec, originals_B3HW))
        atomic_replace(folder / f"step-{step:08d}.png", lambda path: sheet.save(path, format="PNG"))


def reconstruct(codec: ImageCodec, images_B3HW: Tensor) -> Tensor:
    """Images through the codec and back, a few at a time; on the CPU."""
    device = codec.codebook.device
    parts = images_B3HW.split(codec.images_at_once)
    return torch.cat([codec.decode(codec.encode(part.to(device))).cpu() for part in parts])


def in_two_rows(originals_B3HW: Tensor, reconstructions_B3HW: Tensor) -> Image.Image:
    """Originals above, reconstructions below."""
    count, _, height, width = originals_B3HW.shape
    size = (count * (width + _GAP) + _GAP, 2 * (height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    for row, images_B3HW in enumerate((originals_B3HW, reconstructions_B3HW)):
        for column, image_3HW in enumerate(images_B3HW):
            place = (_GAP + column * (width + _GAP), _GAP + row * (height + _GAP))
            sheet.paste(to_pil(image_3HW), place)
    return sheet


def side_by_side(original_3HW: Tensor, reconstruction_3HW: Tensor) -> Image.Image:
    """The original at the left, the reconstruction at the right."""
    _, height, width = original_3HW.shape
    sheet = Image.new("RGB", (2 * width + _GAP, height), "white")
    sheet.paste(to_pil(original_3HW), (0, 0))
    sheet.paste(to_pil(reconstruction_3HW), (width + _GAP, 0))
    return sheet
