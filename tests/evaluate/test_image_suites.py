"""PSNR, CLIP score and FID against slow references."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moma.data.shards import open_shards
from moma.errors import UserError
from moma.evaluate.images import clip_score, fid
from moma.evaluate.suite import run_suite
from moma.evaluate.suites import Subject
from moma.evaluate.summary import Record
from moma.generate.settings import Settings
from moma.runtime.world import World
from moma.tokenizers.image.codec import preprocess
from tests.evaluate.reference import mixed_of
from tests.factories import write_captions

CAPTIONS = ("a red square", "a blue square", "a paper")


@pytest.fixture(scope="module")
def mixed(tiny):
    return mixed_of(tiny)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three captioned images of other sizes than the codec's, the first with a second caption."""
    folder = tmp_path_factory.mktemp("captioned")
    random = np.random.default_rng(0)
    images = {
        f"{n}.png": Image.fromarray(random.integers(0, 255, (20, 24, 3), np.uint8))
        for n in range(len(CAPTIONS))
    }
    write_captions(folder, dict(zip(images, CAPTIONS, strict=True)), images)
    with (folder / "captions.jsonl").open("a") as file:
        file.write(json.dumps({"image": "0.png", "caption": "another"}) + "\n")
    return folder


def images_in(folder: Path) -> list[Image.Image]:
    return [Image.open(folder / f"{n}.png").convert("RGB") for n in range(len(CAPTIONS))]


def run(mixed, tiny, name, path=None, **options):
    world = World(torch.device("cpu"))
    return run_suite(name, mixed, tiny.data, world, path, quiet=True, **options)["sources"]


def drawn(mixed):
    answers = mixed.generate([[caption] for caption in CAPTIONS], Settings("image"))
    return [image for (image,) in answers]


def test_reconstruction_is_what_the_codec_decodes(mixed, tiny, folder):
    errors = []
    for image in [*images_in(folder), images_in(folder)[0]]:
        original_13HW = preprocess(image, 16)[None]
        decoded_13HW = mixed.codec.decode(mixed.codec.encode(original_13HW))
        errors.append(np.square((decoded_13HW - original_13HW).double().numpy()).mean())
    row = run(mixed, tiny, "reconstruction", folder)["captions"]
    assert row["documents"] == 4
    # The range of pixels in [−1, 1] is 2.
    assert row["psnr"]["value"] == pytest.approx(10 * np.log10(4 / np.mean(errors)), rel=1e-5)
    assert row["psnr"]["low"] < row["psnr"]["value"] < row["psnr"]["high"]


def test_reconstruction_of_what_is_held_out(mixed, tiny):
    rows = run(mixed, tiny, "reconstruction")
    shard = open_shards(tiny.data.folder("captions"), mixed.model.vocabulary).splits["held_out"]
    assert [*rows] == ["all", "captions"] and rows["captions"]["documents"] == len(shard)


def write_clip(folder: Path) -> Path:
    """A CLIP model of random weights, whose tokens are letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    letters = [chr(ord("a") + n) for n in range(26)]
    names = [*letters, *(f"{each}</w>" for each in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: n for n, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    size = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    ids = {"vocab_size": len(names), "bos_token_id": 52, "eos_token_id": 53}
    config = CLIPConfig(
        text_config=size | ids | {"max_position_embeddings": 32},
        vision_config=size | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=CLIPTokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=32
        ),
    ).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_clip_score_is_a_cosine(mixed, tiny, folder, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    path = write_clip(tmp_path)
    model, processor = CLIPModel.from_pretrained(path), CLIPProcessor.from_pretrained(path)
    cosines = []
    for caption, image in zip(CAPTIONS, drawn(mixed), strict=True):
        inputs = processor(text=[caption], images=image, return_tensors="pt")
        pixels = model.get_image_features(inputs["pixel_values"]).pooler_output
        text = model.get_text_features(inputs["input_ids"]).pooler_output
        cosines.append(float(torch.cosine_similarity(pixels, text)))
    row = run(mixed, tiny, "clip_score", folder, weights=str(path))["captions"]
    expected = 100 * np.clip(cosines, 0, None).mean()
    assert row["documents"] == 3 and expected > 0
    assert row["clip_score"]["value"] == pytest.approx(expected, rel=1e-4)


class Means(nn.Module):
    """The mean of each color channel, as features of an image."""

    num_features = 3

    def forward(self, pixels_B3HW):
        return pixels_B3HW.float().mean((2, 3))


def test_fid_is_the_frechet_distance_of_features(mixed, tiny, folder):
    pytest.importorskip("torchmetrics")
    subject = Subject(mixed, lambda sequences: [], tiny.data, folder)
    suite = fid(subject, Means())
    records = suite.measure(suite.units)
    assert records == [Record("captions", {})] * 3
    # Pixels of a codec are in [−1, 1].
    real = [127.5 * (1 + preprocess(image, 16).numpy()) for image in images_in(folder)]
    generated = [np.asarray(image, float).transpose(2, 0, 1) for image in drawn(mixed)]
    means, covariances = [], []
    for images in (real, generated):
        features = np.array([image.mean((1, 2)) for image in images])
        means.append(features.mean(0))
        covariances.append(np.cov(features.T))
    first, second = covariances
    root = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum()
    expected = np.square(means[0] - means[1]).sum() + np.trace(first + second) - 2 * root
    assert suite.totals()["fid"]["value"] == pytest.approx(expected, rel=1e-4)


def test_captions_that_leave_no_space_for_an_image(mixed, tiny, folder, tmp_path, capsys):
    """The second caption of the first image is taken, and the third image is left out."""
    pytest.importorskip("torchmetrics")
    long = " ".join(["red"] * 80)
    captions = [("0.png", long), ("0.png", "another"), ("1.png", "a paper"), ("2.png", long)]
    for image in ("0.png", "1.png", "2.png"):
        (tmp_path / image).write_bytes((folder / image).read_bytes())
    rows = [{"image": image, "caption": text} for image, text in captions]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    suite = fid(Subject(mixed, lambda sequences: [], tiny.data, tmp_path), Means())
    assert [prompt.caption for prompt in suite.units] == ["another", "a paper"]
    error = " ".join(capsys.readouterr().err.split())
    assert "left out 2 of 4 documents" in error
    assert "a caption that leaves no space for an image in the context of 64 tokens" in error


def test_weights_that_cannot_be_had(mixed, tiny, folder, tmp_path):
    with pytest.raises(UserError, match=r"fid: .*(moma\[fid\]|--weights)"):
        run(mixed, tiny, "fid", folder, weights=str(tmp_path / "missing.pth"))
    with pytest.raises(UserError, match=r"cannot load the CLIP model .*--weights"):
        run(mixed, tiny, "clip_score", folder, weights=str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_not_waited_for(mixed, tiny, folder, tmp_path, monkeypatch):
    """Its cache has nothing of the model, all files, or all but the weights."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    named = r"cannot load the CLIP model nobody/none \(.*\); name a folder"
    subject = Subject(mixed, lambda sequences: [], tiny.data, folder, weights="nobody/none")
    with pytest.raises(UserError, match=named):
        clip_score(subject)
    cache, commit = tmp_path / "models--nobody--none", "0" * 40
    files = cache / "snapshots" / commit
    for folder in (cache / "refs", files):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    write_clip(files)
    assert len(clip_score(subject).units) == 3
    (files / "model.safetensors").unlink()
    with pytest.raises(UserError, match=named):
        clip_score(subject)


def test_documents_without_captioned_images(mixed, tiny, tmp_path):
    file = tmp_path / "pages.jsonl"
    file.write_text('{"segments": [{"type": "text", "text": "the red"}]}\n')
    with pytest.raises(UserError, match="no document has an image"):
        run(mixed, tiny, "reconstruction", file)
    with pytest.raises(UserError, match="all 1 documents are not one image with one text"):
        run(mixed, tiny, "clip_score", file, weights=str(write_clip(tmp_path)))
