"""Reading one image safely, whatever it is stored as.

    file or bytes → header: format, size → first frame, upright → 8 bits, on white → RGB

What arrives is not trusted: only formats that Pillow decodes itself are opened (its PostScript
reader starts a program), and the size is checked before a pixel is decoded.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from moma.errors import UserError

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# How files of these formats are called. Of two files of one name the first is taken.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".jp2", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".svg"),
)
MAX_PIXELS = 64_000_000
# Pillow itself refuses more.
PILLOW_MAX_PIXELS = 178_956_970
DRAWING_SIDE = 512
_DRAWING_BYTES = 16 * 2**20
# A line of pixels, its short side resized, would take gigabytes.
_LONGEST = 8


def read_image(
    file: Path | bytes,
    place: str,
    instead: str = "remove the row",
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Read an image as 8-bit RGB, turned upright (EXIF), its transparency blended on white.

    The first frame of an animation is taken. An SVG file is drawn within 512 × 512 pixels.

    Args:
        file: the file, or what it holds.
        place: where it is named, for the message.
        instead: the other way out, for the message.
        max_pixels: most pixels of the first frame.

    Raises:
        UserError: the image is missing, too large, truncated, damaged or of another kind.
    """
    what = str(file) if isinstance(file, Path) else "the image"
    with _named(place, what, instead):
        if isinstance(file, Path) and file.suffix.lower() == ".svg":
            return on_white(_draw(file, f"{place}: {what}"))
        with _opened(file) as image:
            _check_size(image, max_pixels, f"{place}: {what}")
            image.load()
            return _flat(ImageOps.exif_transpose(image))


def image_size(file: Path) -> tuple[int, int] | None:
    """Width and height as the file's header tells them; None if it tells none."""
    try:
        with _opened(file) as image:
            return image.size
    except Exception:  # Damaged headers make Pillow raise nearly anything.
        return None


@contextmanager
def _opened(file: Path | bytes) -> Iterator[Image.Image]:
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    with warnings.catch_warnings():
        # Below Pillow's limit it only warns; ours decides.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(source, formats=_formats()) as image:
            yield image


@cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _named(place: str, what: str, instead: str) -> Iterator[None]:
    """Turn everything that can go wrong into one message."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{place}: there is no {what}; add the file or {instead}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{place}: {what} is too large ({error}); shrink it") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{place}: cannot read {what} (it is no image of a known format: "
            f"{', '.join(_formats())}); save it again as PNG or JPEG or {instead}"
        ) from error
    # Damaged files make Pillow's decoders raise nearly anything, from SyntaxError to struct.error.
    except Exception as error:
        raise UserError(
            f"{place}: cannot read {what} ({error}); save it again as PNG or JPEG or {instead}"
        ) from error


def _check_size(image: Image.Image, max_pixels: int, what: str) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise UserError(
            f"{what} is too large: {width} × {height} pixels are more than "
            f"max_pixels = {max_pixels}; shrink it or raise 'max_pixels'"
        )


def _flat(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode."""
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise ValueError("its pixels are fractions, so that black and white are not known")
    return on_white(image)


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey levels of 16 bits → the upper 8, as Pillow does with 16-bit colours."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 0xFFFF:
        raise ValueError("its grey levels have more than 16 bits")
    grey = (levels >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[levels == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _draw(file: Path, what: str) -> Image.Image:
    """Draw an SVG file; only with what stands in it, since it may name any file of the machine."""
    if file.stat().st_size > _DRAWING_BYTES:
        raise UserError(f"{what} is too large: a drawing may have 16 MiB; simplify it")
    try:
        import resvg_py
    except ImportError as error:
        raise UserError(f"{what}: to draw SVG, run pip install 'moma[demo]'") from error
    from lxml import etree

    parser = etree.XMLParser(resolve_entities="internal", no_network=True, load_dtd=False)
    root = etree.parse(str(file), parser).getroot()
    links = [
        value
        for element in root.iter(etree.Element)
        for key, value in element.attrib.items()
        if etree.QName(element).localname in ("image", "feImage") and key.endswith("href")
    ]
    if not all(link.strip().startswith(("#", "data:")) for link in links):
        raise ValueError("it shows other files")
    drawn = resvg_py.svg_to_bytes(
        svg_string=etree.tostring(root, encoding="unicode"),
        width=DRAWING_SIDE,
        height=DRAWING_SIDE,
        dpi=96,  # or lengths in points would be zero
        skip_system_fonts=True,
    )
    return Image.open(io.BytesIO(bytes(drawn)))


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
