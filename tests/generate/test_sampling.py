"""Sampling: temperature, nucleus and penalties, and noise that is tied to positions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moma.errors import UserError
from moma.generate.sampling import (
    Sampler,
    Sampling,
    argmax_in_nucleus,
    argmax_in_nucleus_on_cpu,
    gumbel_noise,
)

GREEDY = Sampling(temperature=0)


def sample(logits_TV, sampling):
    """Sample one token from each row, at successive positions."""
    noise = [
        gumbel_noise(sampling.seed, position, logits_TV.shape[1])
        for position in range(len(logits_TV))
    ]
    return Sampler(sampling)(logits_TV, torch.stack(noise))


def nucleus(probabilities, top_p):
    """The most likely tokens that together have probability `top_p`."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    tokens, total = set(), 0.0
    for token in order:
        tokens.add(token)
        total += probabilities[token]
        if total >= top_p:
            return tokens
    return tokens


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 1000), min_size=2, max_size=12, unique=True),
    st.floats(0.05, 1.0),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_samples_are_in_the_nucleus(counts, top_p, temperature):
    logits_V = torch.tensor(counts, dtype=torch.float64).log()
    probabilities = (logits_V / temperature).softmax(-1).tolist()
    sampled = sample(logits_V.repeat(300, 1), Sampling(temperature, top_p))
    # A sum that meets top_p exactly may be rounded either way.
    allowed = nucleus(probabilities, top_p) | nucleus(probabilities, top_p + 1e-9)
    assert set(sampled.tolist()) <= allowed


@pytest.mark.parametrize("changes", [{}, {"top_k": 7}, {"min_p": 0.2}, {"top_k": 9, "min_p": 0.1}])
@pytest.mark.parametrize("top_p", [0.2, 0.7, 0.95])
def test_samples_are_those_of_the_processors_of_transformers(changes, top_p):
    sampling = Sampling(0.7, top_p, **changes)
    logits_TV = 2 * torch.randn(300, 20, generator=torch.Generator().manual_seed(1))
    noise_TV = torch.stack([gumbel_noise(2, position, 20) for position in range(300)])
    expected_TV = logits_TV
    for warper in (
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(changes.get("top_k", 20)),
        TopPLogitsWarper(top_p),
        MinPLogitsWarper(changes.get("min_p", 0.0)),
    ):
        expected_TV = warper(torch.LongTensor(), expected_TV)
    expected_T = (expected_TV + noise_TV).argmax(-1)
    assert torch.equal(Sampler(sampling)(logits_TV, noise_TV), expected_T)


@pytest.mark.parametrize("top_p", [0.12, 0.33, 0.62])
def test_ties_at_the_edge_of_the_nucleus_are_broken_by_index(top_p):
    """The processor's order of equal logits is undefined: slightly lower ones come last."""
    logits_TV = torch.randint(3, (300, 20), generator=torch.Generator().manual_seed(1)).double()
    noise_TV = torch.stack([gumbel_noise(2, position, 20) for position in range(300)])
    kept_TV = TopPLogitsWarper(top_p)(torch.LongTensor(), logits_TV - 1e-9 * torch.arange(20))
    expected_T = (logits_TV + noise_TV).masked_fill(kept_TV == -torch.inf, -torch.inf).argmax(-1)
    assert torch.equal(Sampler(Sampling(1, top_p))(logits_TV, noise_TV), expected_T)
    equal_TV = torch.zeros(400, 20)
    kept = TopPLogitsWarper(top_p)(torch.LongTensor(), equal_TV[:1]).isfinite().sum()
    assert set(sample(equal_TV, Sampling(1, top_p)).tolist()) == set(range(int(kept)))


@pytest.mark.parametrize("top_p", [0.01, 0.33, 0.62, 0.95])
def test_a_cpu_finds_what_a_gpu_finds(top_p):
    random = torch.Generator().manual_seed(4)
    tied_TV = torch.randint(3, (300, 20), generator=random).float()
    for logits_TV in (tied_TV, 3 * torch.randn(300, 20, generator=random)):
        noisy_TV = logits_TV + torch.stack([gumbel_noise(3, row, 20) for row in range(300)])
        noisy_TV[:, 5] = logits_TV[:, 5] = -torch.inf
        found_T = argmax_in_nucleus_on_cpu(noisy_TV, logits_TV, top_p)
        assert torch.equal(found_T, argmax_in_nucleus(noisy_TV, logits_TV, top_p))


@pytest.mark.parametrize("find", [argmax_in_nucleus, argmax_in_nucleus_on_cpu])
def test_probabilities_that_are_nan_end_the_search(find):
    logits_TV = torch.tensor([[0.0, math.inf, 1.0]])
    assert find(logits_TV, logits_TV, 0.9).tolist() == [1]


def test_the_nucleus_is_sampled_in_proportion():
    probabilities = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2])
    sampling = Sampling(temperature=1, top_p=0.85)
    sampled = sample(probabilities.log().repeat(20_000, 1), sampling)
    found = sampled.bincount(minlength=5) / 20_000
    # 0.4 + 0.3 + 0.2 are the first to reach 0.85.
    expected = torch.tensor([0, 0.4, 0, 0.3, 0.2]) / 0.9
    assert torch.allclose(found, expected, atol=0.02)
    assert found[0] == found[2] == 0


def test_a_small_nucleus_is_the_most_likely_token():
    logits_BV = torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    sampled = sample(logits_BV, Sampling(1.0, 1e-6))
    assert torch.equal(sampled, logits_BV.argmax(-1))
    assert torch.equal(sampled, sample(logits_BV, GREEDY))


def test_masked_tokens_are_never_sampled():
    logits_BV = torch.zeros(500, 6)
    logits_BV[:, [0, 4]] = -torch.inf
    sampled = sample(logits_BV, Sampling(1.0, 1.0))
    assert set(sampled.tolist()) == {1, 2, 3, 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 1e-40}, "temperature 1e-40: must be 0"),
        ({"temperature": -0.5}, "temperature -0.5: must be 0"),
        ({"temperature": math.nan}, "temperature nan: must be 0"),
        ({"temperature": math.inf}, "temperature inf: must be 0"),
        ({"temperature": 1e39}, r"temperature 1e\+39: must be 0"),
        ({"temperature": 10**400}, "must be 0 .* or finite"),
        ({"temperature": "1"}, "temperature '1': must be a number"),
        ({"top_p": 0}, "top_p 0: must be from 1e-06 to 1"),
        ({"top_p": 1.01}, "top_p 1.01: must be from"),
        ({"top_p": math.nan}, "top_p nan: must be from"),
        ({"top_p": -math.inf}, "top_p -inf: must be from"),
        ({"top_p": 1e-50}, "top_p 1e-50: must be from"),
        ({"seed": -1}, "seed -1: must be a whole number from 0 to 4294967295"),
        ({"seed": 99999999999999999999}, "seed 99999999999999999999: must be a whole number"),
        ({"seed": 1.5}, "seed 1.5: must be a whole number"),
        ({"top_k": -1}, "top_k -1: must be a whole number, at least 0"),
        ({"top_k": 2.0}, "top_k 2.0: must be a whole number"),
        ({"min_p": 1.5}, "min_p 1.5: must be from 0 to 1"),
        ({"min_p": math.nan}, "min_p nan: must be from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty 0: must be from 0.01 to 100"),
        ({"repetition_penalty": None}, "repetition_penalty None: must be a number"),
    ],
)
def test_sampling_numbers_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Sampling(**changes)


@pytest.mark.parametrize("temperature", [1e-6, 1e30])
def test_extreme_temperatures_sample_allowed_tokens(temperature):
    logits_BV = torch.tensor([[1e4, -1e4, -torch.inf, 9e3]]).repeat(20, 1)
    sampled = sample(logits_BV, Sampling(temperature, 1.0, 2**32 - 1))
    assert set(sampled.tolist()) <= ({0} if temperature < 1 else {0, 1, 3})


def test_top_k_and_min_p_limit_the_tokens():
    logits_TV = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log().repeat(400, 1)
    assert set(sample(logits_TV, Sampling(1, 1, top_k=2)).tolist()) == {0, 1}
    assert set(sample(logits_TV, Sampling(1, 1, min_p=0.4)).tolist()) == {0, 1, 2}


def test_a_repetition_penalty_applies_to_tokens_that_occurred():
    logits_TV = torch.tensor([[2.0, 1.5, -1.0], [2.0, 1.5, -1.0]])
    history = [torch.tensor([0]), torch.tensor([1, 1])]
    sampler = Sampler(Sampling(0, repetition_penalty=2))
    assert sampler(logits_TV, None, history).tolist() == [1, 0]
    negative_TV = torch.tensor([[-1.0, -1.5]])
    assert sampler(negative_TV, None, [torch.tensor([0])]).tolist() == [1]


def test_noise_depends_on_seed_and_position_only():
    noise = gumbel_noise(1, 5, 8)
    assert torch.equal(noise, gumbel_noise(1, 5, 8))
    assert not torch.equal(noise, gumbel_noise(2, 5, 8))
    assert not torch.equal(noise, gumbel_noise(1, 6, 8))
    assert not torch.equal(noise, gumbel_noise(5, 1, 8))


def test_noise_is_gumbel_distributed():
    noise = torch.cat([gumbel_noise(seed, 0, 50) for seed in range(400)]).double()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.03)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.05)
