"""Suites against slow references that score one document at a time."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from moma.data.shards import open_shards
from moma.errors import UserError
from moma.evaluate.perplexity import evaluate
from moma.evaluate.score import score
from moma.evaluate.suite import run_suite
from moma.evaluate.suites import Subject, credit, retrieval
from moma.runtime.world import World
from moma.tokenizers.text import encode_text
from moma.vocabulary import IMAGE
from tests.evaluate.reference import mixed_of, slow_nats, slow_tokens
from tests.factories import write_captions

HERE = World(torch.device("cpu"))
WORDS = ("red", "green", "blue", "black", "square", "paper", "is", "of", "on")


@pytest.fixture(scope="module")
def mixed(tiny):
    return mixed_of(tiny)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """18 captioned images, two of which have the same caption."""
    folder = tmp_path_factory.mktemp("captioned")
    random = np.random.default_rng(0)
    names = [f"{number:02}.png" for number in range(18)]
    pixels = {n: Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)) for n in names}
    texts = {name: f"a {WORDS[n % 9]} {WORDS[n // 9]}" for n, name in enumerate(names)}
    write_captions(folder, texts | {"17.png": texts["16.png"]}, pixels)
    return folder


def run(mixed, tiny, name, path=None, world=HERE, **options):
    return run_suite(name, mixed, tiny.data, world, path, quiet=True, **options)["sources"]


def values(row):
    return {key: each["value"] for key, each in row.items() if isinstance(each, dict)}


def test_perplexity_of_each_source(tiny):
    mixed = mixed_of(tiny, context=2048)
    model, vocabulary = mixed.model, mixed.model.vocabulary
    rows = run(mixed, tiny, "perplexity")
    text_bytes = {"captions": 0, "text": 0}
    for source in ("captions", "text"):
        shard = open_shards(tiny.data.folder(source), vocabulary).splits["held_out"]
        log_likelihoods, are_top, targets = [], [], []
        for row in range(len(shard)):
            ids = shard.ids(row).astype(np.int64)
            log_likelihood, is_top = slow_tokens(model, ids.tolist())
            log_likelihoods.append(log_likelihood)
            are_top.append(is_top)
            targets += ids[1:].tolist()
            text = [id_ for id_ in ids if vocabulary.code_of_id[id_] < 0]
            plain = [id_ for id_ in text if id_ not in vocabulary.special]
            text_bytes[source] += len(mixed.tokenizer.decode(plain).encode())
        assert rows[source]["documents"] == len(shard)
        nats, is_top = -np.concatenate(log_likelihoods), np.concatenate(are_top)
        is_image = vocabulary.modality_of_id[targets] == IMAGE
        is_plain = ~is_image & ~np.isin(targets, vocabulary.special)
        found = values(rows[source])
        assert found["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
        assert found["perplexity_text"] == pytest.approx(math.exp(nats[~is_image].mean()), rel=1e-5)
        bits = nats[is_plain].sum() / math.log(2)
        assert found["bits_per_byte"] == pytest.approx(bits / text_bytes[source], rel=1e-5)
        if source == "captions":
            expected = math.exp(nats[is_image].mean())
            assert found["perplexity_image"] == pytest.approx(expected, rel=1e-5)
            assert found["code_accuracy"] == pytest.approx(is_top[is_image].mean())
        else:
            assert rows[source]["perplexity_image"] is rows[source]["code_accuracy"] is None


def test_perplexity_equals_that_of_packed_batches(tiny):
    mixed = mixed_of(tiny, context=2048)
    data = tiny.data.model_copy(update={"micro_batch_size": 1, "sequence_length": 2048})
    packed = evaluate(mixed.model, tiny.model_copy(update={"data": data}), "auxiliary", quiet=True)
    found = values(run(mixed, tiny, "perplexity")["all"])
    for key in ("perplexity_text", "perplexity_image"):
        assert found[key] == pytest.approx(packed[key], rel=1e-5)


def test_perplexity_cuts_documents_at_the_context(tiny):
    """A window begins with the last token of the one before it, or with an image that it cuts."""
    mixed = mixed_of(tiny, context=30)
    vocabulary, nats, tokens = mixed.model.vocabulary, 0.0, 0
    for name in ("captions", "text"):
        shard = open_shards(tiny.data.folder(name), vocabulary).splits["held_out"]
        for row in range(len(shard)):
            ids = shard.ids(row).tolist()
            start = 0
            while start < len(ids) - 1:
                stop = min(start + 30, len(ids) - 1)
                inside = [vocabulary.code_of_id[ids[at]] >= 0 for at in range(stop + 1)]
                if inside[stop]:
                    begin = max(at for at in range(stop) if ids[at] == vocabulary.begin_image)
                    stop = begin if begin > start else stop
                nats += slow_nats(mixed.model, ids[start : start + 1], ids[start + 1 : stop + 1])
                tokens += stop - start
                start = stop
    found = values(run(mixed, tiny, "perplexity")["all"])
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_routing_is_causal_unless_asked_for(mixed, tiny):
    by_choice = run_suite("perplexity", mixed, tiny.data, HERE, routing="choice", quiet=True)
    assert by_choice["routing"] == "choice"
    causal = run_suite("perplexity", mixed, tiny.data, HERE, quiet=True)
    assert causal["routing"] == "causal"
    assert by_choice["sources"]["all"]["perplexity"] != causal["sources"]["all"]["perplexity"]


def test_captions_score_the_target_only(mixed, tiny, tmp_path):
    """Two captions of one image, in either order, and another image with one."""
    random = np.random.default_rng(0)
    pixels = [Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)) for _ in range(2)]
    write_captions(tmp_path, {}, {f"{n}.png": image for n, image in enumerate(pixels)})
    captions = [(0, "a red square"), (0, "blue paper"), (1, "green")]
    rows = [json.dumps({"image": f"{n}.png", "caption": text}) for n, text in captions]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    sources = tmp_path / "sources.toml"
    sources.write_text(
        f"[[sources]]\nkind = 'captions'\npath = '{tmp_path}'\ncaption_first = 0.5\nname = 'two'"
    )
    vocabulary = mixed.model.vocabulary
    nats, tokens = {"text": 0.0, "image": 0.0}, {"text": 0, "image": 0}
    for number, caption in captions:
        image = vocabulary.wrap_image(mixed.codes(pixels[number]))
        text = encode_text(mixed.tokenizer, caption)
        cases = {
            "text": ([vocabulary.beginning, *image], [*text, vocabulary.end]),
            "image": ([vocabulary.beginning, *text, image[0]], image[1:-1]),
        }
        for name, (prompt, target) in cases.items():
            nats[name] += slow_nats(mixed.model, prompt, target)
            tokens[name] += len(target)
    row = run(mixed, tiny, "captions", sources)["two"]
    assert row["documents"] == 2
    expected = {name: math.exp(nats[name] / tokens[name]) for name in nats}
    found = values(row)
    assert found["image_to_text_perplexity"] == pytest.approx(expected["text"], rel=1e-5)
    assert found["text_to_image_perplexity"] == pytest.approx(expected["image"], rel=1e-5)


def test_captions_of_what_is_held_out(mixed, tiny, capsys):
    rows = run(mixed, tiny, "captions")
    assert [*rows] == ["all", "captions"]
    shards = open_shards(tiny.data.folder("text"), mixed.model.vocabulary).splits["held_out"]
    assert f"left out {len(shards)} of" in capsys.readouterr().err


def test_retrieval_of_one_of_16(mixed, tiny, images):
    model, vocabulary = mixed.model, mixed.model.vocabulary
    rows = [json.loads(line) for line in (images / "captions.jsonl").read_text().splitlines()]
    texts = [encode_text(mixed.tokenizer, row["caption"]) for row in rows]
    codes = [vocabulary.wrap_image(mixed.codes(Image.open(images / row["image"]))) for row in rows]

    def nats_text(text, image):
        return slow_nats(model, [vocabulary.beginning, *image], [*text, vocabulary.end])

    def nats_image(image, text):
        return slow_nats(model, [vocabulary.beginning, *text, vocabulary.begin_image], image[1:-1])

    scorer = partial(score, model, max_tokens=256)
    suite = retrieval(Subject(mixed, scorer, tiny.data, images))
    # The last group overlaps the one before it.
    number, group = 17, range(2, 18)
    (record,) = suite.measure([suite.units[number]])
    for key, nats in {
        "image_to_text": [nats_text(texts[at], codes[number]) for at in group],
        "image_to_text_normalized": [
            nats_text(texts[at], codes[number]) - nats_text(texts[at], []) for at in group
        ],
        "text_to_image": [nats_image(codes[at], texts[number]) for at in group],
        "text_to_image_normalized": [
            nats_image(codes[at], texts[number]) - nats_image(codes[at], []) for at in group
        ],
    }.items():
        is_best = np.isclose(nats, min(nats), rtol=0, atol=1e-6)
        expected = is_best[group.index(number)] / is_best.sum()
        assert record == ("captions", record.sums) and record.sums[key] == (expected, 1)
    assert len(suite.units) == 18


def test_a_draw_counts_in_part():
    assert credit(np.array([1.0, 3.0, 3.0]), 2) == 0.5
    assert credit(np.array([1.0, 3.0, 3.0]), 0) == 0.0


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ("retrieval", "retrieval: there are 3 captioned images, and 16 are needed"),
        ("visual_questions", "--suite visual_questions: needs --from: a JSON Lines file"),
        ("multiple_choice", "--suite multiple_choice: needs --from: a JSON Lines file"),
    ],
)
def test_what_is_held_out_may_not_do(mixed, tiny, suite, message):
    with pytest.raises(UserError, match=message):
        run(mixed, tiny, suite)


def test_documents_of_a_path_must_be_usable(mixed, tiny, tmp_path):
    file = tmp_path / "pages.jsonl"
    file.write_text('{"segments": [{"type": "text", "text": "the red"}]}\n{"segments": 1}\n')
    with pytest.raises(UserError, match=r"pages\.jsonl, row 2.*'segments' must be a list"):
        run(mixed, tiny, "perplexity", file)
    file.write_text(file.read_text().splitlines()[0])
    assert run(mixed, tiny, "perplexity", file)["interleaved"]["documents"] == 1
    with pytest.raises(UserError, match="all 1 documents are not one image with one text"):
        run(mixed, tiny, "captions", file)
