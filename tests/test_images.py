"""Reading images: every guard with a real file."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

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


def png_of(width, height, data=b""):
    """A PNG file that claims a size, whatever it holds; a grey level a pixel."""

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".svg"])
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


def test_a_bomb_in_an_image_s_notes_is_refused(tmp_path):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("a", "b" * 50_000_000, zip=True)
    path = tmp_path / "bomb.png"
    Image.new("RGB", (2, 2)).save(path, pnginfo=notes)
    assert path.stat().st_size < 100_000
    assert "cannot read" in refused(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files_are_refused(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert "cannot read" in refused(path) and "save it again" in refused(path)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp", ".tif"])
def test_the_first_frame_of_an_animation_is_taken(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert getattr(Image.open(path), "n_frames") == 3  # noqa: B009
    assert read(path).getpixel((4, 4)) == RED


def test_cmyk_is_turned_into_rgb(tmp_path):
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


def test_sixteen_bits_with_a_transparent_level(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 300]], dtype=np.uint16)).save(path, transparency=300)
    assert np.asarray(read(path))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("level", [1 << 20, -1])
def test_levels_of_more_bits_are_refused(tmp_path, level):
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[0, level]], dtype=np.int32)).save(path)
    assert "more than 16 bits" in refused(path)
    Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)).save(path)
    assert "its pixels are fractions" in refused(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_blended_on_white(tmp_path, mode):
    image = Image.new(mode, (3, 1), 0)
    black = (0,) * (len(mode) - 1)
    for x, alpha in enumerate((0, 51, 255)):
        image.putpixel((x, 0), (*black, alpha))
    image.save(tmp_path / "a.png")
    assert np.asarray(read(tmp_path / "a.png"))[0, :, 2].tolist() == [255, 204, 0]


@pytest.mark.parametrize("transparent", [1, bytes([255, 0])])
def test_a_palette_s_transparency_is_blended_on_white(tmp_path, transparent):
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
def test_what_is_no_image_is_refused(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    assert "it is no image of a known format: " in refused(tmp_path / "a.png")
    assert "it is no image" in refused(data)
    assert "EPS" not in FORMATS
    assert image_size(tmp_path / "a.png") is None


def test_a_missing_file_is_refused(tmp_path):
    message = refused(tmp_path / "a.png", instead="choose another")
    assert message.endswith("add the file or choose another")
    assert "cannot read" in refused(tmp_path)


SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" {} height="24pt">'
    '<rect width="99" height="99"/>{}</svg>'
)


def test_a_drawing_is_drawn(tmp_path):
    (tmp_path / "a.svg").write_text(SVG.format('width="48pt"', ""))
    image = read(tmp_path / "a.svg")
    assert image.size == (512, 256) and image.getpixel((9, 9)) == (0, 0, 0)
    (tmp_path / "a.svg").write_text(SVG.format('viewBox="0 0 1 100000000"', ""))
    assert max(read(tmp_path / "a.svg").size) <= 512


def test_a_drawing_shows_no_other_file(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    for shown in (
        f'<image href="{tmp_path}/secret.png" width="9" height="9"/>',
        '<g xmlns:x="http://www.w3.org/1999/xlink"><image x:href="secret.png"/></g>',
        '<filter id="f"><feImage href="secret.png"/></filter>',
    ):
        (tmp_path / "a.svg").write_text(SVG.format("", shown))
        assert "it shows other files" in refused(tmp_path / "a.svg")


def test_a_drawing_that_swells_is_refused(tmp_path):
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    laughs = f'<!DOCTYPE svg [<!ENTITY e0 "ha">{entities}]>' + SVG.format("", "<text>&e11;</text>")
    (tmp_path / "a.svg").write_text(laughs)
    assert "cannot read" in refused(tmp_path / "a.svg")
    (tmp_path / "a.svg").write_text(SVG.format("", " " * 17 * 2**20))
    assert "a drawing may have 16 MiB" in refused(tmp_path / "a.svg")
