"""Samples with drafts follow the distribution of plain sampling."""

from collections import Counter
from itertools import product

import pytest
import torch

from moma.generate.decode import decode
from moma.generate.sampling import Sampling
from moma.generate.sequence import Branch, Options, Request
from moma.model.transformer import ModelConfig, Transformer
from tests.factories import make_vocabulary

VOCABULARY = make_vocabulary(codes=range(30, 33))
CODES = list(VOCABULARY.image_codes)
DRAWS = 1500


@pytest.mark.slow
@torch.no_grad()
def test_drafted_images_follow_the_distribution_of_plain_sampling():
    """All 81 images of four codes, against the products of a full pass's probabilities."""
    config = ModelConfig(dim=16, layers=1, heads=2, groups="moe_1t1i")
    model = Transformer(config, VOCABULARY, (0.5, 0.5))
    model.initialize(0)
    model.get_parameter("layers.0.attention.output.weight").mul_(3)  # codes depend on earlier ones
    model.eval()
    prompt = [VOCABULARY.beginning, 10]
    images = list(product(CODES, repeat=VOCABULARY.codes_per_image))
    tokens = [[*prompt, VOCABULARY.begin_image, *codes] for codes in images]
    routing = model.named_routing("causal")
    logits_BSV = model(torch.tensor(tokens), routing=routing).head[:, len(prompt) : -1]
    log_BSR = logits_BSV[..., CODES].log_softmax(-1)
    chosen_BS1 = torch.tensor(images)[..., None] - CODES[0]
    probability_B = log_BSR.gather(2, chosen_BS1).sum((1, 2)).double().exp()

    drafted = 0
    options = Options("image", 40, 40, Sampling(1.0, 1.0), drafts=3)
    answers: list[list[int]] = [[] for _ in range(DRAWS)]
    requests = [Request([Branch(prompt)], options, seed) for seed in range(DRAWS)]
    for number, new, _ in decode(model, enumerate(requests)):
        answers[number] += new
        drafted += len(set(new) & set(CODES)) > 1
    assert drafted > DRAWS / 10
    counts = Counter(tuple(answer[1:-1]) for answer in answers)
    found = torch.tensor([counts[image] for image in images], dtype=torch.float64)
    expected = probability_B * DRAWS
    likely = expected >= 5
    found, expected = (
        torch.cat((each[likely], each[~likely].sum()[None])) for each in (found, expected)
    )
    statistic = ((found - expected) ** 2 / expected).sum()
    degrees = len(found) - 1
    assert degrees > 20
    # Four standard deviations above the mean of the chi-square distribution.
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5
