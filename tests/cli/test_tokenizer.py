"""`moma tokenizer`: the verbs from end to end, and their messages about bad input."""

import json
import os
import shutil

import pytest
import tomli_w
from PIL import Image

from moma.data.documents import Document, is_held_out
from moma.images import read_image
from moma.runs import Tokenizers
from moma.tokenizers.image.codec import ImageCodec, preprocess
from moma.tokenizers.image.metrics import measure_codec
from moma.vocabulary import Vocabulary
from tests.command_line import moma, refuses, succeeds
from tests.factories import tiny_recipe, write_sources

CHANGES = (
    "text_tokenizer.vocabulary_size=320",
    "text_tokenizer.reserved=2",
    "codec.codebook_size=32",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer_cli")
    write_sources(folder / "sources")
    recipe = tiny_recipe(folder / "sources", folder / "data")
    values = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    (folder / "recipe.toml").write_text(tomli_w.dumps(values))
    return folder


@pytest.fixture(scope="module")
def made(sources):
    """A folder of tokenizers, made by the verbs."""
    out = sources / "tokenizers"
    recipe = sources / "recipe.toml"
    printed = succeeds("tokenizer", "train-text", recipe, "--out", out)
    assert printed.startswith(f"{out}/tokenizer.json: 320 ids, learned from ")
    outcome = moma(
        "tokenizer",
        "train-image",
        recipe,
        "codec_training.log_every=2",
        "codec_training.quantizer_start_step=1",
        "--out",
        out,
    )
    assert outcome.code == 0, outcome.err
    assert "no perceptual loss; codec_training.perceptual.weights" in outcome.err
    assert f"{out}/codec: PSNR " in outcome.out and "of the codes used" in outcome.out
    return out


def test_a_recipe_gives_a_complete_folder(made):
    vocabulary = Vocabulary.load(made / "vocabulary.json")
    assert (vocabulary.size, len(vocabulary.image_codes), vocabulary.codes_per_image) == (
        320,
        32,
        16,
    )
    log = (made / "codec_training" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in log] == [2, 4]
    assert json.loads(log[-1])["psnr"] > 0
    assert (made / "codec_training" / "samples" / "step-00000004.png").is_file()


def test_prepare_uses_the_folder(sources, made):
    data = sources / "prepared"
    succeeds("prepare", sources / "recipe.toml", f"data.tokenizers={made}", f"data.path={data}")
    assert (data / "vocabulary.json").read_text() == (made / "vocabulary.json").read_text()


def test_files_and_changes_give_a_tokenizer(sources, tmp_path):
    text = sources / "sources" / "text.txt"
    printed = succeeds("tokenizer", "train-text", text, text, *CHANGES, "--out", tmp_path)
    assert "learned from 120 documents" in printed
    names = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert {"<reserved:0>", "<reserved:1>", "<code:31>"} <= {token["content"] for token in names}
    vocabulary = Vocabulary.load(tmp_path / "vocabulary.json")
    # The number of codes per image is that of [codec] until there is a codec.
    assert (len(vocabulary.image_codes), vocabulary.codes_per_image) == (32, 1024)


def test_each_of_several_files_is_read(tmp_path):
    for number, count in ((1, 3), (2, 50), (3, 7)):
        text = "\n\n".join(f"a{number} text number {index}" for index in range(count))
        (tmp_path / f"{number}.txt").write_text(text)
    files, out = [tmp_path / f"{number}.txt" for number in (1, 2, 3)], tmp_path / "out"
    printed = succeeds("tokenizer", "train-text", *files, *CHANGES, "--out", out)
    assert "learned from 60 documents" in printed
    missing = (files[0], tmp_path / "no.txt", *CHANGES, "--out", tmp_path / "other")
    assert "no.txt" in refuses("tokenizer", "train-text", *missing)


def test_the_same_command_completes_an_interrupted_folder(sources, made, tmp_path):
    folder, recipe = tmp_path / "killed", sources / "recipe.toml"
    shutil.copytree(made, folder)
    whole = (folder / "vocabulary.json").read_text()
    for verb in ("train-text", "train-image"):
        (folder / "vocabulary.json").unlink()
        printed = succeeds("tokenizer", verb, recipe, "--out", folder)
        assert printed.startswith(f"{folder}/")
        assert (folder / "vocabulary.json").read_text() == whole
        assert "exists already" in refuses("tokenizer", verb, recipe, "--out", folder)
    (folder / "vocabulary.json").unlink()
    figures = json.loads(succeeds("tokenizer", "train-image", recipe, "--out", folder, "--json"))
    assert figures == json.loads((folder / "codec/metrics.json").read_text())
    assert figures.keys() == {"psnr", "codes_used", "perplexity", "images"}


def test_text_without_images_needs_only_a_text_tokenizer(sources, tmp_path):
    text = sources / "sources" / "text.txt"
    succeeds("tokenizer", "train-text", text, *CHANGES, "--out", tmp_path / "text")
    values = {
        "path": str(tmp_path / "data"),
        "micro_batch_size": 2,
        "sequence_length": 64,
        "image_share": 0,
    }
    source = {"kind": "text", "path": str(text)}
    tokenizers = {"tokenizers": str(tmp_path / "text")}
    recipe = tmp_path / "text.toml"
    for name, more in (("taken", tokenizers), ("own", {})):
        values |= {"path": str(tmp_path / name), "sources": [source]}
        recipe.write_text(tomli_w.dumps({"data": values | more}))
        changes = () if more else CHANGES
        counts = json.loads(succeeds("prepare", recipe, *changes, "--json"))
        assert counts["documents"] == 60 and counts["images"] == 0
        assert not (tmp_path / name / "codec").exists()
        assert Vocabulary.load(tmp_path / name / "vocabulary.json").size == 320


def test_too_little_text_is_reported(sources, tmp_path):
    text = sources / "sources" / "text.txt"
    changes = ("text_tokenizer.vocabulary_size=4000", "codec.codebook_size=32")
    outcome = moma("tokenizer", "train-text", text, *changes, "--out", tmp_path)
    assert outcome.code == 0 and "too few repetitions for 4000 ids" in outcome.err


def test_show_writes_an_image_beside_its_reconstruction(sources, made, tmp_path):
    image, out = sources / "sources" / "3.png", tmp_path / "shown" / "both.png"
    arguments = ("--image", image, "--out", out)
    result = json.loads(succeeds("tokenizer", "show", made, *arguments, "--json"))
    codec = ImageCodec.load(Tokenizers(made).codec)
    original = preprocess(read_image(image, "", ""), 16)
    assert result["psnr"] == pytest.approx(measure_codec(codec, [original]).psnr, abs=2e-3)
    assert (result["image"], result["codes"]) == (str(out), 16)
    assert 1 <= result["distinct_codes"] <= 16
    with Image.open(out) as both, Image.open(image) as before:
        assert both.size == (44, 24)
        assert both.crop((4, 4, 20, 20)).tobytes() == before.convert("RGB").tobytes()
    assert "distinct_codes" in succeeds("tokenizer", "show", made, *arguments)


@pytest.mark.parametrize("text", ["a red [bold]square</s> é\n", "", os.fsdecode(b"caf\xe9")])
def test_show_reports_an_exact_round_trip_of_text(made, text):
    result = json.loads(succeeds("tokenizer", "show", made, "--text", text, "--json"))
    assert result["exact"] is True
    assert len(result["ids"]) == len(result["pieces"])
    expected = os.fsencode(text).decode("utf-8", "backslashreplace")
    assert result["text"] == expected
    assert "exactly" in succeeds("tokenizer", "show", made, "--text", text)


def test_bad_input_is_one_message(sources, made, tmp_path):
    recipe, image = sources / "recipe.toml", sources / "sources" / "3.png"
    assert "give either --image or --text" in refuses("tokenizer", "show", made)
    both = ("--image", image, "--text", "a")
    assert "give either" in refuses("tokenizer", "show", made, *both)
    assert "there are no tokenizers" in refuses("tokenizer", "show", tmp_path, "--image", image)
    assert "there are no tokenizers" in refuses("tokenizer", "show", tmp_path, "--text", "a")
    missing = refuses("tokenizer", "show", made, "--image", tmp_path / "no.png")
    assert "there is no" in missing and "no.png" in missing
    folder = refuses("tokenizer", "show", made, "--image", image, "--out", tmp_path)
    assert "is a folder; name a file in it" in folder
    again = refuses("tokenizer", "train-text", recipe, "--out", made)
    assert "exists already" in again
    assert "no.txt" in refuses("tokenizer", "train-text", tmp_path / "no.txt", *CHANGES)
    unknown = refuses("tokenizer", "train-text", image, "codec.size=3")
    assert "the command line: unknown key 'codec.size'" in unknown
    assert "name a recipe or text files" in refuses("tokenizer", "train-text", "a=b")
    weights = refuses("tokenizer", "import-chameleon", made, tmp_path / "no.pt", "--out", tmp_path)
    assert "no.pt: cannot read the weights" in weights


def test_texts_without_a_usable_document_are_refused(sources, tmp_path):
    broken, out = tmp_path / "broken.txt", tmp_path / "out"
    broken.write_bytes(b"\xff\xfe")
    printed = refuses("tokenizer", "train-text", broken, *CHANGES, "--out", out)
    assert (
        "1 of 1 documents were rejected" in printed
        and "UTF-8" in printed
        and str(broken) in printed
    )
    broken.write_bytes(b"\xff\n\n" + b"a word\n\n" * 9)
    printed = refuses("tokenizer", "train-text", broken, *CHANGES, "--out", out)
    assert "1 of 10 documents were rejected" in printed and "raise data.max_rejected" in printed
    assert not out.exists()
    allowed = "data.max_rejected=0.1"
    assert "9 documents" in succeeds(
        "tokenizer", "train-text", broken, *CHANGES, allowed, "--out", out
    )


def test_unreadable_held_out_images_do_not_prevent_codec_training(sources, tmp_path):
    images = tmp_path / "images"
    write_sources(images)
    recipe = tiny_recipe(images, tmp_path / "data")
    (source, _) = recipe.data.sources
    for document in source.documents():
        assert isinstance(document, Document)
        if is_held_out(document, 0.2):
            (images / document.name).write_bytes(b"no image")
    values = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(values))
    outcome = moma("tokenizer", "train-image", tmp_path / "recipe.toml", "--out", tmp_path / "out")
    assert outcome.code == 0 and "an image was left out" in outcome.err


def test_an_unwritable_output_file_gives_one_message(sources, made, tmp_path):
    (tmp_path / "file").write_text("")
    image = sources / "sources" / "3.png"
    for out in (tmp_path / "file" / "out.png", "/proc/x/out.png"):
        printed = refuses("tokenizer", "show", made, "--image", image, "--out", out)
        assert printed.endswith("; choose another path")
