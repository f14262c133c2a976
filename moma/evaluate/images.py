"""Suites about images: reconstruction by the codec, and images generated for captions.

Shapes: see `tokenizers/image/codec.py`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from moma.data.documents import Document, ImageRef
from moma.errors import UserError, error_reason, shorten
from moma.evaluate.documents import raw_documents
from moma.evaluate.suites import Subject, Suite, report_left_out
from moma.evaluate.summary import Record, identity
from moma.generate.settings import Settings
from moma.images import square_pixels
from moma.tokenizers.image.codec import to_float
from moma.tokenizers.image.metrics import signal_to_noise

CLIP = "openai/clip-vit-large-patch14"
# The files of a CLIP model on the Hugging Face hub, and not its weights for other libraries.
_CLIP_FILES = ["*.json", "*.txt", "model*.safetensors"]


def reconstruction(subject: Subject) -> Suite:
    """PSNR of images that the codec encodes and decodes: the best that a model can draw."""
    codec = subject.mixed.codec
    device = codec.codebook.device

    def measure(documents: Sequence[tuple[str, list[ImageRef]]]) -> list[Record]:
        records = []
        for source, images in documents:
            error, values = 0.0, 0
            for image in images:
                pixels_1HW3 = torch.from_numpy(_pixels(subject, image.read()))[None].to(device)
                original_13HW = to_float(pixels_1HW3)
                difference_13HW = codec.decode(codec.encode(original_13HW)) - original_13HW
                error += float(difference_13HW.square().sum())
                values += difference_13HW.numel()
            records.append(Record(source, {"psnr": (error, values)}))
        return records

    with_images = []
    for source, document in raw_documents(subject.data, subject.path):
        if images := [part for part in document.segments if not isinstance(part, str)]:
            with_images.append((source, images))
    if not with_images:
        raise UserError("no document has an image; name others with --from")
    return Suite(with_images, measure, {"psnr": lambda error: signal_to_noise(error, 1)})


class Prompt(NamedTuple):
    """A caption to draw, and the image that it belongs to.

    Attributes:
        number: determines the seed of the drawing.
    """

    number: int
    source: str
    caption: str
    image: ImageRef


def clip_score(subject: Subject) -> Suite:
    """Mean of 100 times the cosine of CLIP's embeddings of a generated image and its caption.

    Negative cosines count as 0 (Hessel et al. 2021, arXiv 2104.08718, with weight 100).
    """
    from huggingface_hub import snapshot_download
    from transformers import CLIPModel, CLIPProcessor

    name = subject.weights or CLIP
    # Files that are missing, damaged or cannot be downloaded raise different errors.
    try:
        # `from_pretrained` waits half a minute for a hub that cannot be reached; this does not.
        path = name if Path(name).exists() else snapshot_download(name, allow_patterns=_CLIP_FILES)
        model = CLIPModel.from_pretrained(path).eval().to(subject.device)
        processor = CLIPProcessor.from_pretrained(path)
    except Exception as error:
        raise UserError(
            f"clip_score: cannot load the CLIP model {name} ({shorten(error_reason(error), 200)}); "
            "name a folder with one with --weights"
        ) from error

    @torch.no_grad()
    def measure(prompts: Sequence[Prompt]) -> list[Record]:
        records = []
        for prompt, image in _generated(subject, prompts):
            inputs = processor(
                text=[prompt.caption], images=image, return_tensors="pt", truncation=True
            )
            output = model(**inputs.to(subject.device))
            cosine = float((output.image_embeds * output.text_embeds).sum())
            records.append(Record(prompt.source, {"clip_score": (max(0.0, 100 * cosine), 1)}))
        return records

    return Suite(_prompts(subject), measure, {"clip_score": identity})


def fid(subject: Subject, features: int | nn.Module = 2048) -> Suite:
    """Fréchet inception distance of generated images to those of the captions (arXiv 1706.08500).

    Args:
        features: number of features of Inception v3, or another network to use.
    """
    metric = _fid_metric(subject, features)

    def measure(prompts: Sequence[Prompt]) -> list[Record]:
        for prompt, image in _generated(subject, prompts):
            for each, is_real in ((prompt.image.read(), True), (image, False)):
                pixels_HW3 = torch.from_numpy(_pixels(subject, each))
                pixels_13HW = pixels_HW3.permute(2, 0, 1)[None].to(subject.device)
                metric.update(pixels_13HW, real=is_real)
        return [Record(prompt.source, {}) for prompt in prompts]

    def totals() -> dict[str, Any]:
        # The metric sums its statistics over ranks.
        return {"fid": {"value": float(metric.compute()), "low": None, "high": None}}

    prompts = _prompts(subject)
    if len(prompts) < 2:
        raise UserError("fid: needs at least two captioned images; name more with --from")
    return Suite(prompts, measure, {}, totals)


def _fid_metric(subject: Subject, features: int | nn.Module) -> Any:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(features, feature_extractor_weights_path=subject.weights)
    except ImportError as error:
        raise UserError(
            "fid: needs torchmetrics and torch-fidelity; run `pip install 'moma[fid]'`"
        ) from error
    except Exception as error:
        raise UserError(
            f"fid: cannot load Inception v3 ({shorten(error_reason(error), 200)}); download "
            "pt_inception-2015-12-05-6726825d.pth of torch-fidelity and name it with --weights"
        ) from error
    return metric.to(subject.device)


def _prompts(subject: Subject) -> list[Prompt]:
    """The captioned images, each with its first caption."""
    _ = subject.mixed.codec  # raises if there is none
    documents = raw_documents(subject.data, subject.path)
    found: dict[tuple[str, str], tuple[str, ImageRef]] = {}
    left_out = 0
    for source, document in documents:
        pair = _caption_and_image(document)
        if pair is not None and _leaves_space(subject, pair[0]):
            found.setdefault((source, document.name), pair)
        else:
            left_out += 1
    context = f"the context of {subject.mixed.context} tokens"
    without_space = f", or have a caption that leaves no space for an image in {context}"
    report_left_out(subject, left_out, len(documents), without_space)
    return [
        Prompt(number, source, *pair) for number, ((source, _), pair) in enumerate(found.items())
    ]


def _leaves_space(subject: Subject, caption: str) -> bool:
    try:
        subject.mixed.require_space([caption], "image")
    except UserError:
        return False
    return True


def _caption_and_image(document: Document) -> tuple[str, ImageRef] | None:
    match document.segments:
        case (str(caption), ImageRef() as image) | (ImageRef() as image, str(caption)):
            return caption, image
    return None


def _generated(subject: Subject, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Image.Image]]:
    """Each prompt and the image that the model generates for its caption."""
    numbered = ((prompt.number, [prompt.caption]) for prompt in prompts)
    answers = dict(subject.mixed.answer(numbered, subject.data.micro_batch_size, Settings("image")))
    for prompt in prompts:
        (image,) = answers[prompt.number]
        assert isinstance(image, Image.Image)
        yield prompt, image


def _pixels(subject: Subject, image: Image.Image) -> np.ndarray:
    """Pixels of an image at the codec's size, uint8 [H, W, 3]."""
    return square_pixels(image, subject.mixed.codec.config.image_size)
