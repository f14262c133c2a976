"""A loaded run computes as it was trained."""

import pytest
import torch

from moma.model.attention_kernels import MaskedAttention
from moma.runs import Run
from moma.runtime.world import World
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.restore import load_run

WORLD = World(torch.device("cpu"))


class CompiledAttention(MaskedAttention):
    is_compiled = True


@pytest.mark.parametrize("trained_with", [MaskedAttention(), CompiledAttention()])
def test_a_loaded_model_attends_as_in_training_without_compilation(
    tiny_run, monkeypatch, trained_with
):
    monkeypatch.setattr(Recipe, "attention_kernel", lambda self, device: trained_with)
    kernel = load_run(tiny_run)[0].kernel
    assert (kernel is trained_with) != trained_with.is_compiled and not kernel.is_compiled


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_loaded_model_computes_in_the_precision_of_training(tiny, tmp_path, compute):
    engine = tiny.engine.model_copy(update={"compute": compute})
    train(tiny.model_copy(update={"run": tmp_path / "run", "engine": engine}), WORLD, quiet=True)
    model, _ = load_run(Run(tmp_path / "run"))
    tokens_BS = torch.zeros(1, 8, dtype=torch.long)
    with torch.no_grad():
        logits = model(tokens_BS).head
    assert logits.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[compute]
    for name, parameter in model.named_parameters():
        is_exact = compute == "fp32" or ".router." in name or ".auxiliary." in name
        assert parameter.dtype == (torch.float32 if is_exact else torch.bfloat16), name
