"""Generation with captured passes equals generation without."""

from dataclasses import replace

import pytest

from moma.generate.sampling import Sampling
from moma.generate.sequence import Branch, Options, Request
from moma.model.routing import ROUTINGS
from tests.generate.test_decode import GREEDY, IMAGE, PROMPTS, make_model
from tests.generate.test_decoder import answers_of, different_requests
from tests.model.captured import capture_passes, never_waiting

# Texts, images after texts, and mixtures; their ends and the lengths of their prompts differ.
LONG = [0, *[9, *IMAGE, 20] * 7]  # with what follows it does not fit into the first 64 positions


def requests_without_drafts():
    found = [
        each._replace(options=replace(each.options, drafts=0)) for each in different_requests()
    ]
    options = Options("mixed", 100, 16, Sampling(1.0), drafts=0)
    found += [Request([Branch(LONG)], options, 20)]
    found += [Request([Branch(PROMPTS[1])], replace(options, mode="image", images=2), 21)]
    found += [Request([Branch(PROMPTS[1])], Options("text", 40, 8, GREEDY), 22)]
    return list(enumerate(found))


@pytest.mark.parametrize(
    ("groups", "routing"),
    [
        ("dense", "threshold"),
        ("moe_4t4i", "threshold"),
        ("mod_moe_4t4i", "threshold"),
        pytest.param("mod_moe_4t4i", "auxiliary", marks=pytest.mark.slow),
        pytest.param("token_4t4i", "threshold", marks=pytest.mark.slow),
    ],
)
def test_captured_passes_change_nothing(groups, routing, monkeypatch):
    model = make_model(groups)
    model.causal_routing = ROUTINGS[routing]
    requests = requests_without_drafts()
    expected = answers_of(model, requests, batch=4)
    recordings = capture_passes(never_waiting(monkeypatch, model))
    assert answers_of(model, requests, batch=4) == expected
    assert recordings.replays > recordings.captures > 0
