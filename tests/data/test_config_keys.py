"""Every key of `[data]` has an effect: each test fails if its key is ignored."""

import threading
from contextlib import closing

import pytest
import torch

from moma.data.batches.iterator import Batches, prefetch
from moma.data.batches.packing import Packer
from moma.data.config import DataConfig, PrepareConfig
from moma.data.encode.prepare import prepare
from moma.errors import UserError
from moma.vocabulary import Vocabulary


def with_data(recipe, **changes):
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})


def prepare_with(recipe, path, **changes):
    """Prepare a copy of the tiny data, with its tokenizers."""
    changes = {"path": path, "tokenizers": recipe.data.path, **changes}
    return prepare(with_data(recipe, **changes), torch.device("cpu"), quiet=True)


def batches_of(recipe, seed=0, **changes):
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    return Batches(with_data(recipe, **changes).data, vocabulary, seed)


def path_is_where_shards_are_written(tiny, tmp_path, monkeypatch):
    prepare_with(tiny, tmp_path / "here")
    assert (tmp_path / "here/shards/text/shard.json").is_file()


def remote_is_where_shards_are_kept(tiny, tmp_path, monkeypatch):
    prepare_with(tiny, tmp_path / "data", remote=f"file://{tmp_path}/remote")
    assert (tmp_path / "remote/sources/text.json").is_file()
    assert not list((tmp_path / "data/shards").rglob("*.arrow"))


def cache_bytes_limits_the_cache(tiny, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"do not fit into data\.cache_bytes = 100;"):
        prepare_with(tiny, tmp_path / "data", remote=f"file://{tmp_path}/remote", cache_bytes=100)
    assert not list((tmp_path / "data").rglob("*.arrow"))


def tokenizers_are_copied(tiny, tmp_path, monkeypatch):
    prepare_with(tiny, tmp_path / "data")
    for name in ("tokenizer.json", "codec/model.safetensors"):
        assert (tmp_path / "data" / name).read_bytes() == (tiny.data.path / name).read_bytes()
    assert not (tmp_path / "data/codec_training").exists()


def micro_batch_size_is_the_number_of_sequences(tiny, tmp_path, monkeypatch):
    assert next(batches_of(tiny, micro_batch_size=1)).tokens_BS.shape == (1, 64)


def sequence_length_is_the_number_of_positions(tiny, tmp_path, monkeypatch):
    assert next(batches_of(tiny, sequence_length=128)).tokens_BS.shape == (2, 128)


def image_share_sets_the_images(tiny, tmp_path, monkeypatch):
    assert [next(batches_of(tiny, image_share=share)).images for share in (0.125, 0.25)] == [1, 2]


def held_out_sets_the_split(tiny, tmp_path, monkeypatch):
    few, many = (
        prepare_with(tiny, tmp_path / str(share), held_out=share).summary()["held_out"]["documents"]
        for share in (0.1, 0.8)
    )
    assert few < 30 < many


def max_rejected_stops_prepare(tiny, tmp_path, monkeypatch):
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\nno JSON\n')
    source = {"kind": "text", "path": str(tmp_path / "two.jsonl"), "weight": 1}
    changes = {**tiny.data.model_dump(), "sources": [source], "image_share": 0}
    data = DataConfig.model_validate(changes)
    for share in (0.4, 0.5):
        recipe = with_data(tiny, sources=data.sources, image_share=0, max_rejected=share)
        recipe = with_data(recipe, path=tmp_path / "data", tokenizers=tiny.data.path, held_out=0)
        if share == 0.5:
            assert prepare(recipe, torch.device("cpu"), quiet=True).summary()["rejected"] == 1
            continue
        with pytest.raises(UserError, match="1 of 2 documents were rejected"):
            prepare(recipe, torch.device("cpu"), quiet=True)


def shard_tokens_limits_a_file(tiny, tmp_path, monkeypatch):
    prepare_with(tiny, tmp_path / "data", shard_tokens=200)
    assert len(list((tmp_path / "data/shards/text").glob("train-*.arrow"))) > 2


def part_bytes_cuts_the_sources(tiny, tmp_path, monkeypatch):
    source = prepare_with(tiny, tmp_path / "data", part_bytes=1).sources["text"]
    assert len({part.part for part in source.parts}) == source.whole.documents_read > 1


def max_padding_refuses_padding(tiny, tmp_path, monkeypatch):
    (captions, _) = tiny.data.sources
    assert next(batches_of(tiny, sources=(captions,), max_padding=1)).padding > 0
    with pytest.raises(UserError, match=r"data\.max_padding allows 10\.00%"):
        batches_of(tiny, sources=(captions,), max_padding=0.1)


def workers_make_batches_in_the_background(tiny, tmp_path, monkeypatch):
    threads, pack = set(), Packer.pack

    def recorded(packer):
        threads.add(threading.get_ident())
        return pack(packer)

    monkeypatch.setattr(Packer, "pack", recorded)
    for workers in (0, 1):
        threads.clear()
        config = with_data(tiny, workers=workers).data
        with closing(prefetch(batches_of(tiny, workers=workers), config)) as batches:
            next(batches)
        assert (threads == {threading.get_ident()}) == (workers == 0)
    with closing(batches_of(tiny, workers=3)) as batches:
        next(batches)
        assert any(thread.name.startswith("ThreadPool") for thread in threading.enumerate())


def prefetch_is_the_number_made_ahead(tiny, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "moma.data.batches.iterator.ThreadPrefetchDatasetIterator",
        lambda batches, size: sizes.append(size),
    )
    prefetch(batches_of(tiny), with_data(tiny, workers=1, prefetch=7).data)
    assert sizes == [7]


def sources_are_encoded(tiny, tmp_path, monkeypatch):
    one = prepare_with(tiny, tmp_path / "data", sources=tiny.data.sources[1:], image_share=0)
    assert one.sources.keys() == {"text"}


TESTS = {
    "path": path_is_where_shards_are_written,
    "remote": remote_is_where_shards_are_kept,
    "cache_bytes": cache_bytes_limits_the_cache,
    "tokenizers": tokenizers_are_copied,
    "micro_batch_size": micro_batch_size_is_the_number_of_sequences,
    "sequence_length": sequence_length_is_the_number_of_positions,
    "image_share": image_share_sets_the_images,
    "held_out": held_out_sets_the_split,
    "max_rejected": max_rejected_stops_prepare,
    "shard_tokens": shard_tokens_limits_a_file,
    "part_bytes": part_bytes_cuts_the_sources,
    "max_padding": max_padding_refuses_padding,
    "workers": workers_make_batches_in_the_background,
    "prefetch": prefetch_is_the_number_made_ahead,
    "sources": sources_are_encoded,
}


@pytest.mark.parametrize("key", TESTS)
def test_a_key_has_its_effect(tiny, tmp_path, monkeypatch, key):
    TESTS[key](tiny, tmp_path, monkeypatch)


def test_every_key_is_tested():
    assert TESTS.keys() == DataConfig.model_fields.keys()
    # The sections have tests of their own; here is the only other key.
    sections = {"text_tokenizer", "codec", "codec_training", "data"}
    assert PrepareConfig.model_fields.keys() - sections == {"seed"}


def test_the_seed_determines_batches_and_tokenizers(tiny, tmp_path):
    first, same, other = (next(batches_of(tiny, seed)).tokens_BS for seed in (0, 0, 1))
    assert (first == same).all() and (first != other).any()
    recipe = with_data(tiny, path=tmp_path / "data").model_copy(update={"seed": 5})
    prepare(recipe, torch.device("cpu"), quiet=True)
    weights = "codec/model.safetensors"
    assert (tmp_path / "data" / weights).read_bytes() != (tiny.data.path / weights).read_bytes()
