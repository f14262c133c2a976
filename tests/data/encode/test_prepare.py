"""`moma prepare`: its results, and the sources that it refuses."""

import json
import os
import threading
from unittest.mock import Mock, call

import numpy as np
import pytest
from PIL import Image

from moma.data.batches.iterator import Batches
from moma.data.documents import Document, is_held_out
from moma.data.encode import prepare as prepare_module
from moma.data.encode import worker as worker_module
from moma.data.encode.prepare import count_documents
from moma.data.provenance import DataFolder, read_provenance
from moma.data.sources.captions import CaptionsConfig
from moma.data.sources.text import TextConfig
from moma.errors import UserError
from moma.tokenizers import folder as folder_module
from tests.data.encode.preparing import contents, make_recipe, run


def test_the_summary_counts_documents_and_tokens(tmp_path):
    recipe = make_recipe(tmp_path, 50)
    prepared = run(recipe)
    summary = prepared.summary()
    captions, text = (summary["sources"][name] for name in ("captions", "text"))
    assert (captions["documents"], captions["images"], captions["rejected"]) == (48, 48, 2)
    assert text["documents"] == 50 and text["images"] == text["rejected"] == 0
    for key in ("documents", "tokens", "images", "rejected"):
        assert summary[key] == captions[key] + text[key]
    held_out = prepared.sources["captions"].counts["held_out"]
    assert captions["held_out"] == held_out.model_dump() and held_out.documents > 0
    in_all = held_out.documents + text["held_out"]["documents"]
    assert summary["held_out"]["documents"] == in_all
    lines = [json.loads(line) for line in (tmp_path / "data/rejected.jsonl").open()]
    assert [line["source"] for line in lines] == ["captions"] * 2
    assert [
        name
        for line, name in zip(lines, ("7.png", "47.png"), strict=True)
        if name in line["reason"]
    ] == ["7.png", "47.png"]
    # Again: nothing to do, the same answer.
    before = contents(tmp_path / "data")
    assert run(recipe).summary() == summary
    assert contents(tmp_path / "data") == before


def test_the_number_of_parts_does_not_affect_how_often_files_are_listed(tmp_path, monkeypatch):
    texts, scandir = tmp_path / "texts", Mock(wraps=os.scandir)
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text("\n\n".join([f"red rocket {number}"] * 20))
    monkeypatch.setattr(os, "scandir", scandir)

    def count(part_bytes):
        scandir.reset_mock()
        recipe = make_recipe(tmp_path, 2, f"data{part_bytes}", image_share=0, part_bytes=part_bytes)
        data = recipe.data.model_copy(update={"sources": (TextConfig(path=texts / "*.txt"),)})
        run(recipe.model_copy(update={"data": data}), processes=1)
        return scandir.mock_calls.count(call(texts))

    assert count(400) == count(10**9) > 0


def test_text_only_data_needs_no_codec(tmp_path):
    recipe = make_recipe(tmp_path, 50, image_share=0)
    sources = recipe.data.sources[1:]
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": sources})})
    prepared = run(recipe)
    assert not (tmp_path / "data/codec").exists()
    assert prepared.vocabulary.codes_per_image == 16
    found = read_provenance(tmp_path / "data")
    assert found is not None and found.encoders.codec == ""
    assert run(recipe).vocabulary == prepared.vocabulary
    batch = next(Batches(recipe.data, prepared.vocabulary, seed=0))
    assert batch.images == 0 and batch.padding == 0
    # Another folder can use its tokenizer.
    data = recipe.data.model_copy(
        update={"tokenizers": tmp_path / "data", "path": tmp_path / "other"}
    )
    copied = run(recipe.model_copy(update={"data": data}))
    assert copied.vocabulary == prepared.vocabulary


def test_progress_has_a_total_with_tokenizers_of_another_folder(tmp_path, capsys):
    recipe = make_recipe(tmp_path, 50)
    run(recipe)
    reusing = make_recipe(tmp_path, 50, "other", tokenizers=str(tmp_path / "data"))
    run(reusing, quiet=False)
    message = capsys.readouterr().err
    assert "encode: 100/100 after" in message
    counts = [count_documents(source, DataFolder(reusing.data)) for source in reusing.data.sources]
    assert counts == [None, None]  # they have shards


def test_counting_stops_after_a_time_limit(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, 50)
    recipe.data.path.mkdir()
    folder = DataFolder(recipe.data)
    monkeypatch.setattr(prepare_module, "MAX_COUNTING_SECONDS", -1)
    assert count_documents(recipe.data.sources[1], folder) is None
    monkeypatch.setattr(prepare_module, "MAX_COUNTING_SECONDS", 60)
    assert count_documents(recipe.data.sources[1], folder) == 50


def test_stopped_codec_training_resumes(tmp_path, monkeypatch):
    undisturbed, recipe = (make_recipe(tmp_path, 40, name) for name in ("undisturbed", "data"))
    training = recipe.codec_training.model_copy(update={"save_every": 2, "log_every": 1})
    undisturbed, recipe = (
        one.model_copy(update={"codec_training": training}) for one in (undisturbed, recipe)
    )
    run(undisturbed)
    real, steps = folder_module.train_codec, []

    def watched(*arguments, progress, **options):
        def note(record):
            steps.append(record["step"])
            progress(record)
            if steps == [1, 2, 3]:
                raise KeyboardInterrupt

        return real(*arguments, progress=note, **options)

    monkeypatch.setattr(folder_module, "train_codec", watched)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    assert not (tmp_path / "data/codec").exists()
    run(recipe)
    assert steps == [1, 2, 3, 3, 4]
    assert contents(tmp_path / "data") == contents(tmp_path / "undisturbed")


def test_an_image_share_without_images_is_refused(tmp_path):
    recipe = make_recipe(tmp_path, 50)
    data = recipe.data.model_copy(update={"sources": recipe.data.sources[1:]})
    with pytest.raises(UserError, match=r"no images.*set image_share, which is 0\.25"):
        run(recipe.model_copy(update={"data": data}))


def test_a_cpu_encodes_in_the_calling_thread(tmp_path, monkeypatch):
    """With a second thread that uses PyTorch, operations wait for each other."""
    threads, real = set(), worker_module.encode_images

    def encode(*arguments):
        threads.add(threading.get_ident())
        return real(*arguments)

    monkeypatch.setattr(worker_module, "encode_images", encode)
    run(make_recipe(tmp_path, rows=50))
    assert threads == {threading.get_ident()}


def test_an_impossible_image_share_is_refused_first(tmp_path):
    with pytest.raises(UserError, match=r"image_share 0\.26"):
        run(make_recipe(tmp_path, 2, image_share=0.26))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("damaged", ["row", "image", "source"])
def test_unusable_sources_are_reported_before_training(tmp_path, capsys, damaged):
    recipe = make_recipe(tmp_path, 50)
    rows = tmp_path / "images/captions.jsonl"
    images, words = [tmp_path / f"images/{n}.png" for n in (3, 4, 5)], tmp_path / "words.txt"
    whole = {path: path.read_bytes() for path in (rows, *images, words)}
    if damaged == "row":
        rows.write_bytes(whole[rows].replace(b'{"image": "1', b'{"image" "1', 3))
        message, rejected = (
            r"3 of 50 documents .*row 2: not valid JSON .*\(rejected\.jsonl .* lists all\)",
            3,
        )
    elif damaged == "image":
        for image in images:
            image.unlink()
        message, rejected = r"3 of 50 documents .*row 4: there is no \S+3\.png; add the file", 3
    else:
        words.unlink()
        message, rejected = r"words\.txt: cannot read it", 0
    with pytest.raises(UserError, match=message):
        run(recipe)
    left = contents(tmp_path / "data")
    assert left.keys() == {"provenance.json", *(["rejected.jsonl"] if rejected else [])}
    lines = left.get("rejected.jsonl", b"").splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["captions"] * rejected
    for path, data in whole.items():
        path.write_bytes(data)
    assert run(recipe).sources["captions"].rejected == 2  # found only when images are read
    assert capsys.readouterr().err == ""


def test_bad_first_rows_do_not_refuse_a_source(tmp_path):
    recipe = make_recipe(tmp_path, 50, max_rejected=0.08)
    for number in (0, 1):
        (tmp_path / f"images/{number}.png").unlink()
    text = recipe.text_tokenizer.model_copy(update={"max_documents": 5})
    training = recipe.codec_training.model_copy(update={"max_documents": 5})
    few = recipe.model_copy(update={"text_tokenizer": text, "codec_training": training})
    assert run(few).sources["captions"].rejected == 4


def test_a_refused_source_keeps_the_rejected_rows_of_others(tmp_path):
    recipe = make_recipe(tmp_path, 50)
    run(recipe)
    before = (tmp_path / "data/rejected.jsonl").read_bytes()
    (tmp_path / "more").mkdir()
    (tmp_path / "more/captions.jsonl").write_text("no row\n")
    more = CaptionsConfig(name="more", path=tmp_path / "more")
    sources = (*recipe.data.sources, more)
    data = recipe.data.model_copy(update={"sources": sources})
    (tmp_path / "data/tokenizer.json").unlink()
    with pytest.raises(UserError, match="source 'more': 1 of 1 documents"):
        run(recipe.model_copy(update={"data": data}))
    after = (tmp_path / "data/rejected.jsonl").read_bytes()
    assert before and after.startswith(before) and b'"more"' in after


def test_sources_that_changed_after_the_tokenizers_are_reported(tmp_path, capsys):
    recipe = make_recipe(tmp_path, 50)
    run(recipe)
    assert capsys.readouterr().err == ""
    weights = (tmp_path / "data/codec/model.safetensors").read_bytes()
    with (tmp_path / "words.txt").open("a") as file:
        file.write("\n\none more")
    prepared = run(recipe)
    message = capsys.readouterr().err
    assert "added or changed since" in message and "captions" not in message
    assert "trained: text; both are kept, as is right if only some documents were fixed" in message
    assert prepared.sources["text"].whole.total.documents == 51
    assert (tmp_path / "data/codec/model.safetensors").read_bytes() == weights


def test_wide_images_are_cropped_before_they_are_resized():
    from moma.images import square_pixels

    line = np.zeros((1, 60_000, 3), np.uint8)
    line[:, 29_000:31_000] = 200
    assert (square_pixels(Image.fromarray(line), 64) == 200).all()
    assert square_pixels(Image.fromarray(line.transpose(1, 0, 2)), 64).shape == (64, 64, 3)


def test_a_damaged_held_out_image_is_skipped(tmp_path):
    recipe = make_recipe(tmp_path, 120, held_out=0.05)
    (source, _) = recipe.data.sources
    kept = [d for d in source.documents() if isinstance(d, Document) and is_held_out(d, 0.05)]
    assert 0 < len(kept) < 10
    (tmp_path / "images" / kept[0].name).write_bytes(b"no image")
    assert run(recipe).summary()["rejected"] in (3, 4)  # it may be one of the three anyway


def test_training_images_are_measured_if_all_held_out_ones_are_damaged(tmp_path):
    recipe = make_recipe(tmp_path, 120, held_out=0.05, max_rejected=0.5)
    (source, _) = recipe.data.sources
    kept = [d for d in source.documents() if isinstance(d, Document) and is_held_out(d, 0.05)]
    assert kept
    for document in kept:
        (tmp_path / "images" / document.name).write_bytes(b"no image")
    prepared = run(recipe)
    assert prepared.sources["captions"].counts["held_out"].documents == 0
    assert json.loads((tmp_path / "data/codec/metrics.json").read_text())["psnr"] > 0


def test_images_left_out_by_an_image_share_of_0_are_reported(tmp_path, capsys):
    recipe = make_recipe(tmp_path, 50, image_share=0)
    prepared = run(recipe)
    left_out = prepared.sources["captions"].counts["train"]
    of_all = left_out.documents + prepared.sources["text"].counts["train"].documents
    expected = (
        f"note: image_share is 0, so {left_out.documents} of the {of_all} training documents, "
        f"those with images ({left_out.images} in captions), are left out, their text too\n"
    )
    assert capsys.readouterr().err == expected
    Batches(recipe.data, prepared.vocabulary, seed=0)
    assert capsys.readouterr().err == expected
    Batches(recipe.data, prepared.vocabulary, seed=0, rank=1, world_size=2)
    Batches(recipe.data, prepared.vocabulary, seed=0, split="held_out")
    assert capsys.readouterr().err == ""


def test_data_without_training_documents_is_refused(tmp_path):
    recipe = make_recipe(tmp_path, 12, held_out=0.999)
    with pytest.raises(UserError, match=r"are held out, so nothing is left.*data\.held_out"):
        run(recipe)
