"""Log-likelihoods against a slow reference that scores one sequence at a time."""

import numpy as np
import pytest

from moma.evaluate.score import ScoredSequence, score, windows, with_target
from tests.evaluate.reference import model_of, slow_score
from tests.factories import make_vocabulary


def random_sequences(model, lengths, seed=0):
    random = np.random.default_rng(seed)
    special = set(model.vocabulary.special)
    allowed = np.array([id_ for id_ in range(model.vocabulary.size) if id_ not in special])
    sequences = []
    for length in lengths:
        is_scored = random.random(length) < 0.5
        is_scored[0], is_scored[-1] = False, True
        sequences.append(ScoredSequence(random.choice(allowed, length), is_scored))
    return sequences


@pytest.mark.parametrize("groups", ["dense", "moe_2t2i", "mod_moe_2t2i"])
@pytest.mark.parametrize("max_tokens", [1, 24, 1000])
def test_scores_equal_those_of_one_sequence_at_a_time(tiny, groups, max_tokens):
    model = model_of(tiny, groups)
    sequences = random_sequences(model, (9, 2, 12, 12, 5))
    for sequence, found in zip(sequences, score(model, sequences, max_tokens), strict=True):
        log_likelihoods, are_top = zip(*slow_score(model, sequence), strict=True)
        assert found.log_likelihood_T == pytest.approx(log_likelihoods, rel=1e-4)
        assert found.is_top_T.tolist() == list(are_top)


def passes(model, sequences, max_tokens):
    shapes = []
    hook = model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    score(model, sequences, max_tokens)
    hook.remove()
    return shapes


def test_batches_are_by_length_and_bounded(tiny):
    model = model_of(tiny, "dense")
    sequences = random_sequences(model, (3, 9, 3, 8, 3, 40))
    # A token that is only a target is not read.
    assert passes(model, sequences, 20) == [(1, 39), (2, 8), (3, 2)]


def test_equal_sequences_are_scored_once_and_equally(tiny):
    model = model_of(tiny)
    first, second = random_sequences(model, (7, 7))
    other_mask = first._replace(is_scored=np.arange(7) > 3)
    assert passes(model, [first, second, first, other_mask], 1000) == [(3, 6)]
    found = score(model, [first, second, first], 1000)
    assert found[0].log_likelihood_T.tolist() == found[2].log_likelihood_T.tolist()


def test_sequence_without_scored_tokens_has_no_scores(tiny):
    model = model_of(tiny)
    nothing, something = with_target([5, 6], []), with_target([5, 6], [7])
    sizes = [len(each.log_likelihood_T) for each in score(model, [nothing, something], 1000)]
    assert sizes == [0, 1]


def test_routing_by_choice_depends_on_the_batch(tiny):
    model = model_of(tiny)
    first, second = random_sequences(model, (9, 12))
    alone = score(model, [first], 1000, "choice")[0].log_likelihood_T
    together = score(model, [first, second], 1000, "choice")[0].log_likelihood_T
    assert not np.allclose(alone, together)


def test_windows_score_each_token_once_and_do_not_begin_in_an_image():
    vocabulary = make_vocabulary()
    image = vocabulary.wrap_image(np.arange(4))
    ids = np.array([0, 30, 31, *image, 32, 33, *image, 1])
    parts = windows(ids, 7, vocabulary)
    scored = np.concatenate([part.ids[part.is_scored] for part in parts])
    assert scored.tolist() == ids[1:].tolist()
    assert all(len(part.ids) <= 8 for part in parts)
    assert [part.ids[0] for part in parts] == [0, 3, 33]


def test_an_image_that_ends_with_a_window_stays_in_it():
    vocabulary = make_vocabulary()
    ids = np.array([0, 30, 31, 32, 33, *vocabulary.wrap_image(np.arange(4)), 34, 1])
    parts = windows(ids, 10, vocabulary)
    assert [part.ids.tolist() for part in parts] == [ids[:11].tolist(), ids[10:].tolist()]


def test_an_image_longer_than_the_context_is_cut():
    vocabulary = make_vocabulary()
    ids = np.array([0, *vocabulary.wrap_image(np.arange(4)), 1])
    parts = windows(ids, 3, vocabulary)
    assert [len(part.ids) for part in parts] == [2, 4, 4]


def test_a_document_of_one_token_has_no_window():
    assert windows(np.array([0]), 3, make_vocabulary()) == []
