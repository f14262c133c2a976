"""`moma prepare`: kills, workers, text alone, sources that change, what is refused at once."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moma.data.batches.iterator import Batches
from moma.data.documents import Document, is_held_out
from moma.data.encode import parts
from moma.data.encode import prepare as prepare_module
from moma.data.encode.prepare import Speed, count_documents, prepare
from moma.data.provenance import DataFolder, read_provenance
from moma.data.shards import Counts, Part
from moma.data.sources.captions import CaptionsConfig
from moma.data.sources.text import TextConfig
from moma.errors import UserError
from moma.files import lock_folder
from moma.recipe import check, write_recipe
from moma.tokenizers import folder as folder_module
from moma.train.recipe import Recipe

WORDS = ["red", "green", "rocket", "left", "of", "an", "apple", "schön"]


def make_recipe(folder: Path, rows: int, data: str = "data", **changes) -> Recipe:
    """Captioned images, one in forty of them unreadable, and a text."""
    images = folder / "images"
    if not images.exists():
        images.mkdir(parents=True)
        draw = random.Random(0)
        lines = []
        for number in range(rows):
            if number % 40 == 7:
                (images / f"{number}.png").write_bytes(b"no image")
            else:
                colour = (draw.randrange(256), draw.randrange(256), draw.randrange(256))
                Image.new("RGB", (20, 16), colour).save(images / f"{number}.png")
            caption = " ".join(draw.choices(WORDS, k=4))
            lines.append(json.dumps({"image": f"{number}.png", "caption": caption}))
        (images / "captions.jsonl").write_text("\n".join(lines) + "\n")
        paragraphs = [" ".join(draw.choices(WORDS, k=12)) for _ in range(rows)]
        (folder / "words.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    sources = [
        {"kind": "captions", "path": str(images)},
        {"kind": "text", "path": str(folder / "words.txt")},
    ]
    values = {
        "seed": 3,
        "text_tokenizer": {"vocabulary_size": 300},
        "codec": {
            "image_size": 16,
            "patch": 4,
            "block_channels": [8],
            "layers_per_block": 1,
            "latent_channels": 8,
            "code_channels": 8,
            "codebook_size": 16,
            "encoder_middle": False,
            "middle_attention": False,
            "norm_groups": 4,
        },
        "codec_training": {
            "steps": 4,
            "batch_size": 4,
            "warmup_steps": 1,
            "quantizer_start_step": 2,
        },
        "data": {
            "path": str(folder / data),
            "micro_batch_size": 2,
            "sequence_length": 64,
            "image_share": 0.25,
            "held_out": 0.2,
            "max_rejected": 0.05,
            "sources": sources,
            **changes,
        },
    }
    return check(Recipe, values, "test")


def run(recipe: Recipe, quiet: bool = True, **options):
    return prepare(recipe, torch.device("cpu"), quiet=quiet, **options)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# Kills


def start(recipe_file: Path) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    root = Path(__file__).parents[3]
    return subprocess.Popen(
        [sys.executable, "-m", "moma.cli", "prepare", recipe_file, "--workers", "1", "--json"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def parts_in(folder: Path) -> int:
    return len(list(folder.glob("shards/*/train-*.arrow")))


def kill_somewhere(process: subprocess.Popen[bytes], folder: Path, draw: random.Random) -> None:
    """Kill a process: a few parts further on, or at any time before the first one."""
    if draw.random() < 0.2:
        until, seconds = float("inf"), draw.uniform(0, 8)
    else:
        until, seconds = parts_in(folder) + draw.randint(1, 4), float("inf")
    end = time.monotonic() + seconds
    while parts_in(folder) < until and time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    process.communicate()


def survive(tmp_path: Path, rows: int, kills: int, shard_tokens: int) -> None:
    undisturbed = make_recipe(tmp_path, rows, "undisturbed", shard_tokens=shard_tokens)
    expected = run(undisturbed)
    assert expected.sources["captions"].rejected == len(range(7, rows, 40)) > 1
    recipe = make_recipe(tmp_path, rows, "killed", shard_tokens=shard_tokens)
    write_recipe(recipe, tmp_path / "recipe.toml")
    draw = random.Random(0)
    landed = 0
    while landed < kills:
        process = start(tmp_path / "recipe.toml")
        kill_somewhere(process, recipe.data.path, draw)
        assert process.returncode == -signal.SIGKILL, "nothing was left to do: more rows"
        landed += 1
    process = start(tmp_path / "recipe.toml")
    out, error = process.communicate()
    assert process.returncode == 0, error.decode()
    assert json.loads(out) == {"path": str(recipe.data.path), **expected.summary()}
    assert contents(recipe.data.path) == contents(undisturbed.data.path)


def test_a_few_kills_change_no_byte(tmp_path):
    survive(tmp_path, rows=60, kills=2, shard_tokens=100)


@pytest.mark.slow
def test_twenty_kills_change_no_byte(tmp_path):
    survive(tmp_path, rows=1200, kills=20, shard_tokens=300)


# Otherwise


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
    # Another folder can take its tokenizer over.
    data = recipe.data.model_copy(
        update={"tokenizers": tmp_path / "data", "path": tmp_path / "other"}
    )
    taken = run(recipe.model_copy(update={"data": data}))
    assert taken.vocabulary == prepared.vocabulary


def test_progress_has_a_total_with_tokenizers_of_another_folder(tmp_path, capsys):
    recipe = make_recipe(tmp_path, 50)
    run(recipe)
    taken = make_recipe(tmp_path, 50, "other", tokenizers=str(tmp_path / "data"))
    run(taken, quiet=False)
    told = capsys.readouterr().err
    assert "encode captions: 50/50 after" in told and "encode text: 50/50 after" in told
    counts = [count_documents(source, DataFolder(taken.data)) for source in taken.data.sources]
    assert counts == [None, None]  # they have shards


def test_counting_stops_after_a_time_limit(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, 50)
    recipe.data.path.mkdir()
    folder = DataFolder(recipe.data)
    monkeypatch.setattr(prepare_module, "MAX_COUNTING_SECONDS", -1)
    assert count_documents(recipe.data.sources[1], folder) is None
    monkeypatch.setattr(prepare_module, "MAX_COUNTING_SECONDS", 60)
    assert count_documents(recipe.data.sources[1], folder) == 50


def test_speed_is_measured_from_the_first_report(monkeypatch):
    clock = iter([100.0, 100.0, 104.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    told = []
    speed = Speed(lambda done, note="": told.append((done, note)))
    counts = {"train": Counts(documents=10, tokens=3000, images=4), "held_out": Counts()}
    part = Part(first=0, stop=12, counts=counts, rejected=2)
    speed(part)  # by an earlier process
    more = {
        "train": Counts(documents=6, tokens=4000, images=4),
        "held_out": Counts(documents=2, tokens=400, images=4),
    }
    speed(part + Part(first=12, stop=21, counts=more, rejected=1))
    assert told == [
        (12, "0 documents/s, 0 tokens/s, 0 images/s, 2 rejected"),
        (21, "2 documents/s, 1,100 tokens/s, 2 images/s, 3 rejected"),
    ]


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
    """Beside a second thread with PyTorch in it, operations wait for each other."""
    threads, real = set(), prepare_module.encode_images

    def encode(*arguments):
        threads.add(threading.get_ident())
        return real(*arguments)

    monkeypatch.setattr(prepare_module, "encode_images", encode)
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
        told, named = (
            r"3 of 50 documents .*row 2: not valid JSON .*\(rejected\.jsonl .* lists all\)",
            3,
        )
    elif damaged == "image":
        for image in images:
            image.unlink()
        told, named = r"3 of 50 documents .*row 4: there is no \S+3\.png; add the file", 3
    else:
        words.unlink()
        told, named = r"words\.txt: cannot read it", 0
    with pytest.raises(UserError, match=told):
        run(recipe)
    left = contents(tmp_path / "data")
    assert left.keys() == {"provenance.json", *(["rejected.jsonl"] if named else [])}
    lines = left.get("rejected.jsonl", b"").splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["captions"] * named
    for path, data in whole.items():
        path.write_bytes(data)
    assert run(recipe).sources["captions"].rejected == 2  # images that only reading tells apart
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
    told = capsys.readouterr().err
    assert "added or changed since" in told and "captions" not in told
    assert "trained: text; both are kept, as is right if only some documents were fixed" in told
    assert prepared.sources["text"].whole.total.documents == 51
    assert (tmp_path / "data/codec/model.safetensors").read_bytes() == weights


def test_data_of_another_codec_is_refused_when_it_is_read(tmp_path):
    recipe = make_recipe(tmp_path, 50)
    vocabulary = run(recipe).vocabulary
    Batches(recipe.data, vocabulary, seed=0)
    manifest = tmp_path / "data/provenance.json"
    values = json.loads(manifest.read_text())
    values["encoders"] = {"tokenizer": "x", "codec": "y"}
    manifest.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"encoded with another tokenizer .*, codec \(\w+ and y\)"):
        Batches(recipe.data, vocabulary, seed=0)


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


def test_a_folder_is_prepared_by_one_process_at_a_time(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, 2)
    monkeypatch.setattr(prepare_module, "LOCK_TIMEOUT", 0.0)
    (tmp_path / "data").mkdir()
    with (
        lock_folder(tmp_path / "data", 0),
        pytest.raises(UserError, match="in use by another process"),
    ):
        run(recipe)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_damaged_manifest_is_reported(tmp_path):
    recipe = make_recipe(tmp_path, 50)
    run(recipe)
    for broken in ("", "[1, 2]", "3"):
        (tmp_path / "data/provenance.json").write_text(broken)
        with pytest.raises(UserError, match=r"provenance\.json: damaged"):
            run(recipe)


def test_a_full_disk_names_the_folder(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, 50)

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parts, "sync_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*captions\.partial"):
        run(recipe)


@pytest.mark.parametrize("name", ["shards/mine.txt", "tokenizer.json", "provenance.json"])
def test_files_of_the_user_are_not_overwritten(tmp_path, name):
    recipe = make_recipe(tmp_path, 50)
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match=f"{name.split('/')[0]}.*data.path="):
        run(recipe)
    assert contents(tmp_path / "data") == {name: b"mine"}


def test_a_file_of_the_user_among_shards_is_not_deleted(tmp_path):
    recipe = make_recipe(tmp_path, 50)
    run(recipe)
    mine = tmp_path / "data/shards/text/mine.txt"
    mine.write_text("mine")
    (tmp_path / "words.txt").write_text("other words\n\n" * 20)
    with pytest.raises(UserError, match=r"shards/text: .*did not write 'mine\.txt'"):
        run(recipe)
    assert mine.read_text() == "mine"


def test_a_changed_tokenizer_is_refused(tmp_path):
    recipe = make_recipe(tmp_path, 50)
    run(recipe)
    with (tmp_path / "data/tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"tokenizer\.json: changed after"):
        run(recipe)


def test_a_source_folder_that_contains_the_data_folder_reads_no_output(tmp_path):
    recipe = make_recipe(tmp_path, 50)
    source = TextConfig(path=tmp_path / "**/*.jsonl", text_key="caption")
    data = recipe.data.model_copy(update={"sources": (source,), "image_share": 0})
    recipe = recipe.model_copy(update={"data": data})
    first = run(recipe).summary()
    (tmp_path / "data/codec_training").mkdir()
    (tmp_path / "data/codec_training/metrics.jsonl").write_text("no JSON\n")
    assert (tmp_path / "data/rejected.jsonl").exists()
    assert run(recipe).summary() == first


def test_data_without_training_documents_is_refused(tmp_path):
    recipe = make_recipe(tmp_path, 12, held_out=0.999)
    with pytest.raises(UserError, match=r"are held out, so nothing is left.*data\.held_out"):
        run(recipe)
