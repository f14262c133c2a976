"""A model to evaluate, and a slow reference that scores one position at a time."""

import numpy as np
import torch

from moma.generate.mixed import MixedModel
from moma.model.routing import ROUTINGS
from moma.runs import Tokenizers
from moma.vocabulary import Vocabulary


def model_of(tiny, groups="moe_2t2i"):
    recipe = tiny.model_copy(update={"model": tiny.model.model_copy(update={"groups": groups})})
    model = recipe.build_model(Vocabulary.load(tiny.data.path / "vocabulary.json")).eval()
    model.causal_routing = ROUTINGS["auxiliary"]
    return model


def mixed_of(tiny, groups="moe_2t2i", context=64):
    return MixedModel.assemble(model_of(tiny, groups), Tokenizers(tiny.data.path), context)


@torch.no_grad()
def slow_score(model, sequence):
    """One position after the other, each from a pass over the tokens before it."""
    found = []
    for at in np.flatnonzero(sequence.is_scored):
        before = torch.from_numpy(sequence.ids[:at])[None]
        logits_V = model(before, routing=model.named_routing("causal")).head[0, -1].double()
        target = int(sequence.ids[at])
        found.append((float(logits_V.log_softmax(-1)[target]), int(logits_V.argmax()) == target))
    return found


@torch.no_grad()
def slow_tokens(model, ids):
    """Log-likelihoods of all tokens but the first, and which are most likely: arrays [S − 1]."""
    ids = torch.tensor(ids)
    logits = model(ids[None, :-1], routing=model.named_routing("causal")).head[0].double()
    log_likelihood = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return log_likelihood.numpy(), (logits.argmax(-1) == ids[1:]).numpy()


def slow_nats(model, prompt, target):
    """Nats of a target, in all, by a pass over one sequence."""
    return -slow_tokens(model, [*prompt, *target])[0][len(prompt) - 1 :].sum()
