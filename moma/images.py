"""Reading one image safely, whatever format it is stored in.

    file or bytes → header: format, size → first frame → 8 bits, on white → upright → RGB

Files are not trusted: only formats that Pillow decodes itself are opened (its PostScript reader
starts a program), and the size is checked before a pixel is decoded. A file that ends before the
pixels do is refused; what follows them is ignored. Of metadata, only the orientation is used: an
image with damaged metadata is read without it.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from moma.errors import UserError, error_reason, shorten, storage_error
from moma.svg import MAX_BYTES, draw_svg

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Suffixes of these formats; of two files with the same stem, the earlier suffix is preferred.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".jp2", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".svg"),
)
MAX_PIXELS = 64_000_000
# Pillow itself refuses larger images.
PILLOW_MAX_PIXELS = 178_956_970
DRAWING_SIDE = 512
# Only smaller files are read again without their metadata.
_MAX_REPAIR_BYTES = 256 * 2**20
_PNG_END = bytes(4) + b"IEND" + zlib.crc32(b"IEND").to_bytes(4)
# A line of pixels whose short side is enlarged would take gigabytes.
_MAX_ASPECT_RATIO = 8
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_T = TypeVar("_T")


def read_image(
    file: Path | bytes, location: str, remedy: str = "remove the row", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read an image as 8-bit RGB, upright by its EXIF orientation, its transparency on white.

    The first frame of an animation is read. An SVG file is drawn within 512 × 512 pixels.

    Args:
        location: where it is named, for messages.
        remedy: what to do other than to repair the image, for messages.
        max_pixels: maximum pixels of the first frame.

    Raises:
        UserError: the image is missing, too large, truncated, damaged or of another format.
    """
    what = shorten(str(file), 300) if isinstance(file, Path) else "the image"

    def decode(image: Image.Image) -> Image.Image:
        width, height = image.size
        if width * height > max_pixels:
            raise UserError(
                f"{location}: {what} is too large: {width} × {height} pixels are more than "
                f"max_pixels = {max_pixels}; shrink it or raise 'max_pixels'"
            )
        image.load()
        method = _UPRIGHT.get(_orientation(image))
        image = _to_rgb(image)
        return image if method is None else image.transpose(method)

    try:
        # A device may have no end.
        if isinstance(file, Path) and file.exists() and not (file.is_file() or file.is_dir()):
            raise UserError(f"{location}: {what} is not a regular file; {remedy}")
        if isinstance(file, Path) and file.suffix.lower() == ".svg":
            with file.open("rb") as opened:
                svg = opened.read(MAX_BYTES + 1)
            return on_white(draw_svg(svg, DRAWING_SIDE, f"{location}: {what}"))
        return _use_image(file, decode)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{location}: there is no {what}; add the file or {remedy}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{location}: {what} is too large ({error}); shrink it") from error
    # On damaged files Pillow's decoders raise almost any exception, even SyntaxError.
    except Exception as error:
        reason = shorten(error_reason(error), 200)
        if isinstance(error, UnidentifiedImageError):
            reason = f"not an image of a known format: {', '.join(_formats())}"
        message = f"cannot read {what} ({reason}); save it again as PNG or JPEG or {remedy}"
        on_disk = storage_error(error, f"{location}: {what}")
        raise on_disk or UserError(f"{location}: {message}") from error


def image_size(file: Path) -> tuple[int, int] | None:
    """Return the width and height in the file's header; None if they cannot be read."""
    try:
        return _use_image(file, lambda image: image.size) if file.is_file() else None
    except Exception:  # On damaged headers Pillow raises almost any exception.
        return None


def _use_image(file: Path | bytes, use: Callable[[Image.Image], _T]) -> _T:
    """Call `use` with the opened image, or, if that fails, with its essential parts."""
    try:
        with _open_image(file) as image:
            return use(image)
    except (UserError, FileNotFoundError, Image.DecompressionBombError):
        raise
    except Exception as error:
        essential = _essential_parts(file)
        if essential is None:
            raise
        try:
            with _open_image(essential) as image:
                return use(image)
        except UserError:
            raise
        except Exception:
            raise error from None  # The first error describes the file.


@contextmanager
def _open_image(file: Path | bytes) -> Iterator[Image.Image]:
    with (
        io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as source,
        warnings.catch_warnings(),
    ):
        # About metadata, and about sizes below Pillow's limit, for which ours decides.
        warnings.simplefilter("ignore")
        with Image.open(source, formats=_formats()) as image:
            if image.format == "PNG":
                _check_png_data(source)
            yield image


@cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_png_data(file: BinaryIO) -> None:
    """Compare the checksums of header, palette and pixels, as Pillow does not for pixels."""
    position = file.tell()
    file.seek(8)
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind == b"IEND":
            break
        if kind[:1].islower():  # metadata
            file.seek(length + 4, io.SEEK_CUR)
            continue
        checksum = zlib.crc32(kind)
        while length and (data := file.read(min(length, 2**20))):
            checksum, length = zlib.crc32(data, checksum), length - len(data)
        stored = file.read(4)
        if len(stored) == 4 and stored != checksum.to_bytes(4):
            raise ValueError("damaged: a checksum does not match its data")
    file.seek(position)


def _essential_parts(file: Path | bytes) -> bytes | None:
    """An image file without ICC profile, text, XMP, thumbnails and what follows the image.

    The EXIF data of PNG, JPEG and WebP, where the orientation is, is kept. None if the format is
    another or the file too long.
    """
    if isinstance(file, Path):
        if file.stat().st_size > _MAX_REPAIR_BYTES:
            return None
        file = file.read_bytes()
    if file.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"".join([file[:8], *filter(_is_essential_png, _png_chunks(file)), _PNG_END])
    if file.startswith(b"\xff\xd8"):
        return _essential_jpeg(file)
    if file[:4] == b"RIFF" and file[8:12] == b"WEBP":
        return _essential_webp(file)
    if file[4:8] == b"jP  ":
        return _essential_jpeg_2000(file)
    if file[4:12] in (b"ftypavif", b"ftypavis"):
        # Offsets in the file are absolute: items get an unknown type instead of being removed.
        items = rb"(infe\x02.{7})(?:Exif|mime)"
        return re.sub(items, rb"\1skip", file, flags=re.DOTALL).replace(b"colrprof", b"skipprof")
    return None


def _chunks(data: bytes, start: int, length_of: Callable[[bytes], int]) -> Iterator[bytes]:
    """The consecutive chunks of a file; `length_of` is the whole length by the first 8 bytes."""
    while len(header := data[start : start + 8]) == 8:
        chunk = data[start : start + max(8, length_of(header))]
        yield chunk
        start += len(chunk)


def _png_chunks(data: bytes) -> Iterator[bytes]:
    chunks = _chunks(data, 8, lambda header: int.from_bytes(header[:4]) + 12)
    return takewhile(lambda chunk: chunk[4:8] != b"IEND", chunks)


def _is_essential_png(chunk: bytes) -> bool:
    kind = chunk[4:8]
    is_intact = zlib.crc32(chunk[4:-4]).to_bytes(4) == chunk[-4:]
    # Upper case: header, palette and pixels. tRNS is the transparency.
    return kind[:1].isupper() or kind == b"tRNS" or (kind == b"eXIf" and is_intact)


def _essential_jpeg(data: bytes) -> bytes | None:
    kept, position = [data[:2]], 2
    while len(header := data[position : position + 4]) == 4:
        marker, kind, length = struct.unpack(">BBH", header)
        if marker != 0xFF:
            return None
        if kind == 0xFF:  # a fill byte
            position += 1
            continue
        if kind == 0xDA:  # the pixels follow
            return b"".join([*kept, data[position:]])
        segment = data[position : position + length + 2]
        # JFIF's and Adobe's segments say what the colors mean.
        is_metadata = kind == 0xFE or (0xE0 < kind <= 0xEF and kind != 0xEE)
        if not is_metadata or segment[4:10] == b"Exif\0\0":
            kept.append(segment)
        position += length + 2
    return None


def _essential_webp(data: bytes) -> bytes:
    def length_of(header: bytes) -> int:
        length = int.from_bytes(header[4:], "little")
        return 8 + length + length % 2

    kept = []
    for chunk in _chunks(data, 12, length_of):
        kind, is_whole = chunk[:4], len(chunk) >= length_of(chunk[:8]) - 1
        if kind == b"VP8X":  # flags: the file has no ICC profile and no XMP
            chunk = chunk[:8] + bytes([chunk[8] & ~0x24]) + chunk[9:]
        if kind not in (b"ICCP", b"XMP ") and (kind != b"EXIF" or is_whole):
            kept.append(chunk)
    body = b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _essential_jpeg_2000(data: bytes) -> bytes:
    def length_of(header: bytes) -> int:
        # A box of length 0 ends with the file; 1 says that the length is longer than 4 bytes.
        return int.from_bytes(header[:4]) if header[:4] > b"\0\0\0\1" else len(data)

    kept = []
    for box in _chunks(data, 0, length_of):
        if box[4:8] in (b"jP  ", b"ftyp", b"jp2h", b"jp2c"):
            kept.append(box)
        if box[4:8] == b"jp2c":  # the pixels; another image may follow
            break
    return b"".join(kept)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of a loaded image; 1, which is upright, if its EXIF data are damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # On damaged EXIF data Pillow raises almost any exception.
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of an image of any mode."""
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise ValueError("its pixels are fractions with unknown values of black and white")
    return on_white(image)


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Gray levels of 16 bits → the upper 8, as Pillow does with 16-bit colors."""
    levels = np.asarray(image).astype(np.int64)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Pillow neither scales 12 bits nor inverts levels whose zero is white.
        (bits, *_) = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))
        levels <<= max(0, 16 - bits)
        if image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
            levels = 0xFFFF - levels
    if levels.min() < 0 or levels.max() > 0xFFFF:
        raise ValueError("its gray levels have more than 16 bits")
    gray = (levels >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[levels == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


def square_pixels(image: Image.Image, size: int) -> np.ndarray:
    """Return the center of an image, uint8 of shape [size, size, 3].

    Transparency becomes white, the short side is resized to `size` (LANCZOS), and the center is
    cropped.
    """
    opaque = on_white(_crop_long_sides(image))
    scale = size / min(opaque.size)
    width, height = (max(size, round(side * scale)) for side in opaque.size)
    resized = opaque.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(resized.crop((left, top, left + size, top + size)))


def png_bytes(image: Any, **options: Any) -> bytes:
    """Return the PNG file of an image or a Matplotlib figure; `options` are those of its writer."""
    buffer = io.BytesIO()
    write = image.save if isinstance(image, Image.Image) else image.savefig
    write(buffer, format="png", **options)
    return buffer.getvalue()


def on_white(image: Image.Image) -> Image.Image:
    """Return an image as RGB, its transparent parts blended on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _crop_long_sides(image: Image.Image) -> Image.Image:
    """The middle of a very long image, whose far ends the center crop would remove anyway."""
    short = min(image.size)
    width, height = (min(side, _MAX_ASPECT_RATIO * short) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
