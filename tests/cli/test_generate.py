"""Options of `moma generate`; its other tests are in `test_root.py`."""

import pytest

from tests.command_line import refuses, succeeds


def test_every_option_changes_the_answer(trained):
    def answer(*options):
        return succeeds(
            "generate", trained / "run", "--prompt", "box 3", "--mode", "text", *options
        )

    plain = answer("--temperature", "2")
    for option in (("--top-k", "1"), ("--min-p", "1"), ("--repetition-penalty", "50")):
        assert answer("--temperature", "2", *option) != plain
    assert answer("--temperature", "2", "--stop", plain.strip()[0]) != plain
    both = answer("--temperature", "2", "--samples", "2")
    assert both.startswith(plain.rstrip("\n")) and len(both) > len(plain)


def test_images_are_guided_and_drafted(trained, tmp_path):
    def drawn(name, *options):
        out = tmp_path / name
        printed = succeeds(
            "generate",
            trained / "run",
            "--prompt",
            "box 3",
            "--mode",
            "image",
            "--out",
            out,
            *options,
        )
        return [(out / line.rsplit("/")[-1]).read_bytes() for line in printed.split()]

    (plain,) = drawn("plain")
    assert drawn("drafts", "--drafts", "3") == [plain]
    assert drawn("guided", "--text-guidance", "40") != [plain]
    assert drawn("one", "--text-guidance", "1", "--image-guidance", "1") == [plain]
    assert len(drawn("several", "--images", "2", "--samples", "2")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mode", "text", "--images", "2"), "--images: no effect with --mode text"),
        (("--text-guidance", "3"), "--text-guidance: no effect with --mode mixed"),
        (("--mode", "text", "--drafts", "2"), "--drafts: no effect with --mode text"),
        (("--mode", "image", "--stop", "."), "--stop: no effect with --mode image"),
        (("--mode", "text", "--stop", ""), "--stop: is empty; give a value"),
        (("--mode", "image", "--text-guidance", "nan"), "scale of text must be finite"),
        (("--repetition-penalty", "0"), "repetition_penalty 0.0: must be from 0.01 to 100"),
    ],
)
def test_options_without_effect_or_out_of_range_are_refused(trained, options, message):
    assert message in refuses("generate", trained / "run", "--prompt", "box", *options)
