"""`moma inspect`: a page and JSON of the routing of a document."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.command_line import refuses, succeeds


def inspect(trained, tmp_path, *options):
    page = tmp_path / "routing.html"
    printed = succeeds("inspect", trained / "run", *options, "--out", page, "--json")
    return json.loads(printed), page.read_text(encoding="utf-8")


def test_text_and_images_are_drawn_in_their_order(trained, tmp_path):
    image = trained / "images" / "1.png"
    options = ("--prompt", "box <3", "--image", image, "--prompt", "red")
    result, page = inspect(trained, tmp_path, *options)
    assert [*result["routings"]] == ["causal", "choice"]
    tokens = result["routings"]["causal"]["tokens"]
    kinds = "".join("i" if "code" in token else "t" for token in tokens)
    assert re.fullmatch("t+i{16}t+", kinds)
    assert "".join(token.get("text", "") for token in tokens) == "<s>box <3<image></image>red"
    codes = [(each["image"], each["row"], each["column"]) for each in tokens if "code" in each]
    assert codes == [(1, row, column) for row in range(4) for column in range(4)]
    for token in tokens:
        assert len(token["layers"]) == 2
        for layer in token["layers"]:
            assert layer["weight"] == 1
            for expert in layer["experts"]:
                assert expert["group"] == ("code" in token) and 0 < expert["weight"] < 1
    # Each token of either routing can be pointed at, and every image has an image for each layer.
    assert page.count("data-info=") == 2 * len(tokens)
    assert page.count("<figcaption>layer ") == 2 * 2
    assert "&lt;" in page and "<script" not in page and "http" not in page


def test_an_image_file_shows_the_same(trained, tmp_path):
    out, image = tmp_path / "routing.PNG", trained / "images" / "1.png"
    run = shutil.copytree(trained / "run", tmp_path / "run $x_{$")  # not a formula
    options = ("--prompt", "box $3_ " * 6, "--image", image)
    assert succeeds("inspect", run, *options, "--out", out) == f"{out}\n"
    drawn = np.asarray(Image.open(out).convert("RGB"))
    assert drawn.shape[1] == 1500 and drawn.shape[0] > 600
    # The colors of both experts of a group, and the paper around them.
    colors = {tuple(color) for color in drawn.reshape(-1, 3).tolist()}
    assert {(0x4E, 0x79, 0xA7), (0xF2, 0x8E, 0x2B), (255, 255, 255)} <= colors
    assert (drawn[[0, -1]] == 255).all() and (drawn[:, [0, -1]] == 255).all()


def test_a_document_of_the_data_is_drawn(trained, tmp_path):
    options = ("--document", 1, "--source", "captions")
    result, page = inspect(trained, tmp_path, *options, "--routing", "choice")
    assert [*result["routings"]] == ["choice"]
    assert "captions, held_out, document 1" in page
    train, _ = inspect(trained, tmp_path, *options, "--split", "train", "--routing", "auxiliary")
    shown = json.loads(
        succeeds("data", "inspect", trained / "data", *options, "--out", tmp_path / "d", "--json")
    )
    tokens = train["routings"]["auxiliary"]["tokens"]
    assert len(tokens) == shown["tokens"] and tokens[-1]["text"] == "</s>"


def test_a_long_document_is_cut_at_the_context(trained, tmp_path):
    _, page = inspect(trained, tmp_path, "--prompt", "box " * 100, "--routing", "causal")
    assert "the first 64 of " in page


def test_without_the_data_only_causal_routing_is_drawn(trained, tmp_path):
    out = ("--prompt", "a", "--data", tmp_path / "gone", "--out", tmp_path / "a.html", "--json")
    result = json.loads(succeeds("inspect", trained / "run", *out))
    assert [*result["routings"]] == ["causal"]
    assert "gone" in refuses("inspect", trained / "run", *out, "--routing", "choice")
    copy = tmp_path / "moved"
    shutil.copytree(trained / "data", copy)
    options = ("--document", 1, "--source", "captions", "--out", tmp_path / "b.html")
    succeeds("inspect", trained / "run", *options, "--data", copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to inspect: give --prompt, --image or both, or --document"),
        (("--prompt", "a", "--document", "1"), "--prompt: no effect with --document"),
        (("--prompt", "a", "--source", "captions"), "--source: no effect without --document"),
        (("--document", "1"), "give --source with one of captions, text"),
        (("--document", "999", "--source", "text"), "--document 999: text has the documents 1 to"),
        (("--image", "missing.png"), "missing.png"),
    ],
)
def test_options_that_name_no_document_are_refused(trained, tmp_path, options, message):
    assert message in refuses("inspect", trained / "run", *options, "--out", tmp_path / "a.html")
