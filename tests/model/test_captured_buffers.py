"""How long buffers and captured passes are kept, and how much memory they take."""

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from moma.model.caches import Caches
from moma.model.transformer import Transformer
from tests.model.captured import capture_passes, never_waiting
from tests.model.test_caches import append, build, some_tokens


def feed(model: Transformer, caches: Caches, *lengths: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return append(model, caches, [some_tokens(random, length) for length in lengths])


@torch.inference_mode()
def test_graphs_serve_their_batch_until_it_changes(monkeypatch):
    recordings = capture_passes(model := never_waiting(monkeypatch, build("mod")))
    caches, captures = model.new_caches(5), []

    def passes(count: int, sequences: int) -> None:
        for _ in range(count):
            feed(model, caches, *[1] * sequences)
        captures.append(recordings.captures)

    feed(model, caches, 20, 3, 3, 3, 3)
    passes(30, 5)
    caches.select([0, 1, 3])  # more than a third of the sequences in the buffers
    passes(3, 3)
    caches.select([1])  # a shorter one, too
    passes(3, 1)
    feed(model, caches, 2)
    passes(2, 1)
    assert captures == [1, 1, 2, 3]
    assert recordings.replays == 38


def held(caches: Caches) -> int:
    """Bytes of the memory that is kept for caches, including what other views of it use."""
    return sum(each.untyped_storage().nbytes() for each in caches.state())


@torch.inference_mode()
def test_buffers_have_at_most_six_times_the_memory_of_caches(monkeypatch):
    model, sizes = never_waiting(monkeypatch, build("mod")), []
    for is_captured in (False, True):
        if is_captured:
            capture_passes(model)
        found, batches = [], []  # batches stay, so that the next one takes over their buffers
        for sequences, length in ((64, 10), (3, 2000), (3, 10), (5, 65), (33, 257)):
            batches.append(caches := model.new_caches(sequences))
            feed(model, caches, *[length] * sequences)
            feed(model, caches, *[1] * sequences)
            found.append(held(caches))
            for kept in (sequences // 3, 1):
                caches.select(range(kept))
                feed(model, caches, *[1] * kept)
                found.append(held(caches))
        sizes.append(found)
    ratios = [captured / other for other, captured in zip(*sizes, strict=True)]
    assert max(ratios) <= 6


@pytest.mark.parametrize("end", ["gone", "larger", "drafts"])
@torch.inference_mode()
def test_buffers_are_dropped_with_their_batch(end, monkeypatch):
    capture_passes(model := never_waiting(monkeypatch, build("dense")))
    caches = model.new_caches(1)
    feed(model, caches, 3)
    feed(model, caches, 1)
    buffer = StorageWeakRef(caches.layers[0].key_BTGC.untyped_storage())
    assert not buffer.expired()
    if end == "gone":
        del caches
    else:
        feed(model, caches, 3 if end == "drafts" else 1)
        if end == "larger":
            other = model.new_caches(2)
            feed(model, other, 3, 3)
            feed(model, other, 1, 1)
    assert buffer.expired()
