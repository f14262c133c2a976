"""Images as the codec sees them, without torch: processes that only read images start fast."""

import numpy as np
from PIL import Image

# A line of pixels, its short side resized, would take gigabytes.
_LONGEST = 8


def square_pixels(image: Image.Image, size: int) -> np.ndarray:
    """The centre of an image, uint8 of shape [size, size, 3].

    Transparency becomes white, the short side is resized to `size` (LANCZOS), and the centre is
    cropped.
    """
    opaque = on_white(_without_far_ends(image))
    scale = size / min(opaque.size)
    width, height = (max(size, round(side * scale)) for side in opaque.size)
    resized = opaque.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(resized.crop((left, top, left + size, top + size)))


def on_white(image: Image.Image) -> Image.Image:
    """An image with its transparent parts blended on white, RGB."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _without_far_ends(image: Image.Image) -> Image.Image:
    """The middle of a very long image: what is far from the centre is cropped in any case."""
    short = min(image.size)
    width, height = (min(side, _LONGEST * short) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
