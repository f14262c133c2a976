"""Reading images of every format, damaged and hostile ones included."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from moma.errors import UserError
from moma.images import FORMATS, SUFFIXES, image_size, read_image

RED = (255, 0, 0)


def read(path, **options):
    image = read_image(path, "list, row 7", **options)
    assert image.mode == "RGB"
    return image


def refused(path, **options):
    with pytest.raises(UserError, match=r"^list, row 7: ") as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def png_chunk(kind, content):
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png_of(width, height, data=b""):
    """A gray PNG file that claims a size, with any data."""

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(data))
    body += png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s != ".svg"])
def test_every_format_is_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.new("L" if suffix == ".pgm" else "RGB", (16, 8), 0).save(path)
    assert read(path).size == image_size(path) == (16, 8)
    assert np.asarray(read(path)).max() < 8
    assert np.array_equal(read(path), read(path.read_bytes()))


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_of(40, 40, b"\0" * 41 * 40))
    assert read(path, max_pixels=1600).size == (40, 40)
    message = refused(path, max_pixels=1599)
    assert "too large: 40 × 40 pixels are more than max_pixels = 1599; shrink it" in message


@pytest.mark.parametrize("side", [12_000, 200_000])
def test_a_decompression_bomb_is_refused(tmp_path, side, recwarn):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(side, side, b"\0" * 100_000))
    assert path.stat().st_size < 1000
    assert "is too large" in refused(path)
    assert not recwarn.list


# Metadata: nothing but the orientation is used, so nothing in it can cost the image.


def test_compressed_text_in_an_image_is_not_expanded(tmp_path):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("a", "b" * 50_000_000, zip=True)
    path = tmp_path / "bomb.png"
    Image.new("RGB", (2, 2), "red").save(path, pnginfo=notes)
    del notes
    tracemalloc.start()
    assert read(path).getpixel((0, 0)) == RED
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="1"/></x:xmpmeta>'
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))


def with_metadata(format, image=NOISE, **more):
    """An image file with every kind of metadata that Pillow writes, and the metadata's bytes."""
    exif = Image.Exif()
    exif[0x112], exif[0x132], exif[0x10F], exif[0x11A] = 1, "2024:01:01", "maker", 72.0
    exif.get_ifd(0x8769)[0x9003] = "2024"
    notes = PngImagePlugin.PngInfo()
    notes.add_text("plain", "b" * 50)
    notes.add_itxt("packed", "c" * 300, zip=True)
    kinds: dict[str, dict] = {
        "PNG": {"pnginfo": notes},
        "JPEG": {"comment": "a comment", "xmp": XMP, "quality": 90},
        "WEBP": {"xmp": XMP, "lossless": True},
        "AVIF": {"xmp": XMP},
        "TIFF": {"description": "a comment"},
    }
    file = io.BytesIO()
    image.save(file, format, icc_profile=ICC, exif=exif, **{**kinds[format], **more})
    data = file.getvalue()
    parts = [ICC, XMP, b"a comment", exif.tobytes(), exif.tobytes()[6:], b"2024:01:01", b"maker"]
    parts += [zlib.compress(ICC), b"plain\0" + b"b" * 50, zlib.compress(b"c" * 300)]
    return data, [(data.find(p), data.find(p) + len(p)) for p in parts if p in data]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF"])
def test_an_image_with_damaged_metadata_is_read(format, capfd):
    data, spans = with_metadata(format)
    assert len(spans) >= 3
    expected, random = read(data).tobytes(), Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        start, end = random.choice(spans)
        for _ in range(random.choice([1, 2, 8])):
            damaged[random.randrange(start, end)] = random.choice([0, 255, random.randrange(256)])
        assert read(bytes(damaged)).tobytes() == expected


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_image_with_truncated_metadata_is_read(format):
    data, _ = with_metadata(format)
    if format == "PNG":  # move the metadata behind the pixels
        chunk = png_chunk(b"zTXt", b"note\0\0" + zlib.compress(b"x" * 99))
        data = data.removesuffix(png_chunk(b"IEND", b"")) + chunk
    assert all(read(data[:-n]).tobytes() == NOISE.tobytes() for n in range(1, 30))


def exif_of(*entries):
    """EXIF data of (tag, type, count, value) entries, of which the values may be nonsense."""
    offset, body, table = 8 + 2 + 12 * len(entries) + 4, b"", b""
    for tag, kind, count, value in entries:
        if len(value) <= 4:
            table += struct.pack("<HHL", tag, kind, count) + value.ljust(4, b"\0")
        else:
            table += struct.pack("<HHLL", tag, kind, count, offset + len(body))
            body += value
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + table + bytes(4) + body


@pytest.mark.parametrize(
    "odd",
    [
        (0x132, 5, 1, struct.pack("<LL", 2024, 1)),  # a date that is a number
        (0x11A, 10, 1, struct.pack("<ll", -72, 1)),  # a negative resolution
        (0x11A, 5, 1, struct.pack("<LL", 72, 0)),  # an infinite resolution
        (0x8769, 4, 1, struct.pack("<L", 2**31)),  # EXIF's own table outside the file
        (0x10F, 2, 2**31, b"\xff\xff\xff\xff"),  # a text outside the file
    ],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_orientation_is_used_with_malformed_exif_data(format, odd):
    file = io.BytesIO()
    turned = (0x112, 3, 1, struct.pack("<H", 6))
    Image.new("RGB", (8, 4)).save(file, format, exif=exif_of(turned, odd))
    assert read(file.getvalue()).size == (4, 8)


@pytest.mark.parametrize("exif", [b"Exif\0\0no tiff", b"Exif\0\0", exif_of((0x112, 2, 9, b"x"))])
def test_an_orientation_that_cannot_be_read_is_ignored(exif):
    file = io.BytesIO()
    NOISE.save(file, "PNG", exif=exif)
    assert read(file.getvalue()).tobytes() == NOISE.tobytes()


def test_the_size_in_a_file_with_damaged_metadata_is_read(tmp_path):
    data, spans = with_metadata("PNG")
    damaged = bytearray(data)
    damaged[spans[0][0]] ^= 1
    (tmp_path / "a.png").write_bytes(damaged)
    assert image_size(tmp_path / "a.png") == (40, 24)
    assert "max_pixels = 9" in refused(tmp_path / "a.png", max_pixels=9)


def test_pixels_of_a_png_that_do_not_match_their_checksum_are_refused():
    data = bytearray(png_of(64, 64, b"\0" * 65 * 64))
    data[data.index(b"IDAT") + 9] ^= 4
    assert "a checksum does not match" in refused(bytes(data))


def test_messages_are_short(tmp_path):
    path = tmp_path / ("a" * 250) / ("b" * 250) / ("c" * 250)
    assert len(refused(path)) < 500


# Damaged and unusual pixels


PIXEL_SUFFIXES = [suffix for suffix in SUFFIXES if suffix != ".svg"]


def noise_file(tmp_path, suffix):
    """The content of a file of noise, which no format compresses to nothing."""
    (NOISE.convert("L") if suffix == ".pgm" else NOISE).save(tmp_path / f"a{suffix}")
    return (tmp_path / f"a{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", PIXEL_SUFFIXES)
def test_a_file_that_ends_before_its_pixels_is_refused(tmp_path, suffix):
    data = noise_file(tmp_path, suffix)
    for share in (0.02, 0.3, 0.9):
        message = refused(data[: int(len(data) * share)])
        assert "cannot read" in message and "save it again" in message


@pytest.mark.parametrize("suffix", PIXEL_SUFFIXES)
def test_bytes_after_the_pixels_are_ignored(tmp_path, suffix):
    data = noise_file(tmp_path, suffix)
    expected = read(data).tobytes()
    for rest in (bytes(50), b"garbage" * 9, b"\xff\xd8\xff", data, data[:99]):
        assert read(data + rest).tobytes() == expected


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_the_first_frame_of_an_animation_is_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert getattr(Image.open(path), "n_frames") == 3  # noqa: B009
    assert read(path).getpixel((4, 4)) == RED


def test_cmyk_becomes_rgb(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path, quality=100)
    red, green, blue = read(path).getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_become_eight(tmp_path, suffix):
    levels = np.array([[0, 255, 256, 0x7FFF, 0x8000, 0xFFFF]], dtype=np.uint16)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(levels).save(path)
    assert Image.open(path).mode.startswith("I")
    assert np.asarray(read(path))[0, :, 1].tolist() == [0, 0, 1, 127, 128, 255]


def tiff_of(levels, bits, photometric):
    """A TIFF file of one row of gray levels, packed in `bits` bits."""
    packed = int("".join(f"{level:0{bits}b}" for level in levels), 2)
    data = packed.to_bytes(-(-len(levels) * bits // 8))
    if bits == 16:
        data = np.frombuffer(data, ">u2").astype("<u2").tobytes()
    entries = [(256, len(levels)), (257, 1), (258, bits), (259, 1), (262, photometric)]
    entries += [(273, 8), (277, 1), (278, 1), (279, len(data))]
    table = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in entries)
    start = struct.pack("<2sHL", b"II", 42, 8 + len(data))
    return start + data + struct.pack("<H", len(entries)) + table + bytes(4)


def test_tiff_files_of_12_bits_and_with_white_as_zero_are_scaled():
    assert np.asarray(read(tiff_of([0, 0x7FF, 0x800, 0xFFF], 12, 1)))[0, :, 1].tolist() == [
        *(0, 127, 128, 255)
    ]
    assert np.asarray(read(tiff_of([0, 0x7FFF, 0xFFFF], 16, 0)))[0, :, 1].tolist() == [255, 128, 0]
    assert np.asarray(read(tiff_of([0, 0x7FFF, 0xFFFF], 16, 1)))[0, :, 1].tolist() == [0, 127, 255]


def test_sixteen_bits_with_a_transparent_level(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 300]], dtype=np.uint16)).save(path, transparency=300)
    assert np.asarray(read(path))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("level", [1 << 20, -1])
def test_levels_of_more_than_16_bits_are_refused(tmp_path, level):
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[0, level]], dtype=np.int32)).save(path)
    assert "more than 16 bits" in refused(path)
    Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)).save(path)
    assert "pixels are fractions" in refused(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_blended_on_white(tmp_path, mode):
    image = Image.new(mode, (3, 1), 0)
    black = (0,) * (len(mode) - 1)
    for x, alpha in enumerate((0, 51, 255)):
        image.putpixel((x, 0), (*black, alpha))
    image.save(tmp_path / "a.png")
    assert np.asarray(read(tmp_path / "a.png"))[0, :, 2].tolist() == [255, 204, 0]


@pytest.mark.parametrize("transparent", [1, bytes([255, 0])])
def test_transparency_of_a_palette_is_blended_on_white(tmp_path, transparent):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=transparent)
    read_back = read(tmp_path / "a.png")
    assert [read_back.getpixel((x, 0)) for x in (0, 1)] == [RED, (255, 255, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, orientation):
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste(Image.new("RGB", (16, 8), "red"), (0, 0))
    turn = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }.get(orientation)
    stored = upright.transpose(Image.Transpose[turn]) if turn else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert read(tmp_path / "a.png").tobytes() == upright.tobytes()


@pytest.mark.parametrize("data", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%EOF\n"])
def test_a_file_that_is_not_an_image_is_refused(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    assert "not an image of a known format: " in refused(tmp_path / "a.png")
    assert "not an image" in refused(data)
    assert "EPS" not in FORMATS
    assert image_size(tmp_path / "a.png") is None


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="the system has no such device")
def test_a_device_is_refused():
    with pytest.raises(UserError, match=r"here: /dev/zero is not a regular file; remove the row"):
        read_image(Path("/dev/zero"), "here")


def test_a_missing_file_is_refused(tmp_path):
    message = refused(tmp_path / "a.png", remedy="choose another")
    assert message.endswith("add the file or choose another")
    assert "cannot read" in refused(tmp_path)


SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" {} height="24pt">'
    '<rect width="99" height="99"/>{}</svg>'
)


def test_an_svg_file_is_drawn(tmp_path):
    (tmp_path / "a.svg").write_text(SVG.format('width="48pt"', ""))
    image = read(tmp_path / "a.svg")
    assert image.size == (512, 256) and image.getpixel((9, 9)) == (0, 0, 0)
    (tmp_path / "a.svg").write_text(SVG.format('viewBox="0 0 1 100000000"', ""))
    assert max(read(tmp_path / "a.svg").size) <= 512


def test_an_svg_file_must_not_refer_to_other_files(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    for shown in (
        f'<image href="{tmp_path}/secret.png" width="9" height="9"/>',
        '<g xmlns:x="http://www.w3.org/1999/xlink"><image x:href="secret.png"/></g>',
        '<filter id="f"><feImage href="secret.png"/></filter>',
    ):
        (tmp_path / "a.svg").write_text(SVG.format("", shown))
        assert "it refers to other files" in refused(tmp_path / "a.svg")


def test_an_svg_file_with_nested_entities_or_of_enormous_size_is_refused(tmp_path):
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    laughs = f'<!DOCTYPE svg [<!ENTITY e0 "ha">{entities}]>' + SVG.format("", "<text>&e11;</text>")
    (tmp_path / "a.svg").write_text(laughs)
    assert "cannot read" in refused(tmp_path / "a.svg")
    (tmp_path / "a.svg").write_text(SVG.format("", " " * 17 * 2**20))
    assert "a drawing may have 16 MiB" in refused(tmp_path / "a.svg")
