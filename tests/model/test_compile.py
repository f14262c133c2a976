"""A training step is one graph for every architecture, and stays it while the data change."""

from typing import Any

import pytest
import torch

from moma.model.architecture import ModelConfig
from moma.model.depth import DepthConfig
from moma.model.transformer import Transformer
from moma.runtime.world import can_compile
from moma.train.step import cross_entropy_sums
from moma.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    size=120,
    beginning=0,
    end=1,
    padding=2,
    begin_image=3,
    end_image=4,
    image_codes=tuple(range(60, 120)),
    codes_per_image=4,
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{
        name: {"groups": name}
        for name in ("dense", "moe_8x", "moe_1t1i", "moe_2t2i", "moe_3t1i", "mod", "mod_moe_1t1i")
    },
    "mod_moe_2t2i": {"groups": "mod_moe_2t2i", "kv_heads": 1, "norm": "pre"},
    "mod_by_row": {"groups": "mod", "depth": DepthConfig(choose="row"), "attend": "row"},
    "tied": {"groups": "moe_2t2i", "tied_embeddings": True},
}
ROWS, LENGTH = 10, 8


def batch_of(step: int) -> tuple[torch.Tensor, ...]:
    """Tokens of any mix, documents of any length, and padding now and then.

    No token comes twice: equal ones tie, and rounding would decide between them.
    """
    generator = torch.Generator().manual_seed(step)
    ids = 5 + torch.randperm(VOCABULARY.size - 5, generator=generator)
    tokens = ids[: ROWS * LENGTH].view(ROWS, LENGTH)
    starts = torch.rand(ROWS, LENGTH, generator=generator) < 0.2
    documents = starts.cumsum(1)
    if step % 3 == 0:
        tokens[-1, 5:], documents[-1, 5:] = VOCABULARY.padding, -1
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH).contiguous()
    return tokens, tokens.roll(-1, 1), documents, positions


def make_step(case: str, layers: int = 2):
    shape = {"dim": 16, "layers": layers, "heads": 2}
    config = ModelConfig.model_validate(shape | ARCHITECTURES[case])
    model = Transformer(config, VOCABULARY, (0.5, 0.5))
    model.initialise(0)

    def step(tokens, labels, documents, positions):
        output = model(tokens, documents, positions)
        losses = cross_entropy_sums(
            output.logits_BSV.flatten(0, 1), labels.flatten(), model.modality_of_id, 1e-5
        )
        return losses.objective, losses.loss_M, output.unsound_L

    return model, step


def assert_one_graph(case: str, backend: str, steps: int) -> None:
    torch.compiler.reset()
    model, step = make_step(case)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for number in range(steps):
        batch = batch_of(number)
        results = []
        for run in (compiled, step):
            model.zero_grad()
            # After the first step, to compile anew is an error.
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                objective, loss_M, unsound_L = run(*batch)
            objective.backward()
            assert not unsound_L.any()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            results.append([objective, loss_M, *gradients])
        torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_every_architecture_is_one_graph(case):
    """Captured whole, without code: what breaks or recompiles a graph is found here already."""
    assert_one_graph(case, "eager", steps=4)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_compiled_code_of_every_architecture_equals_eager(case):
    assert_one_graph(case, "inductor", steps=50)


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
def test_a_compiled_layer_equals_eager():
    """As the loop does it, layer by layer."""
    model, _ = make_step("mod_moe_2t2i", layers=1)
    tokens, _, documents, positions = batch_of(1)
    eager = model(tokens, documents, positions).logits_BSV
    for unit in model.units():
        unit.compile(fullgraph=True)
    compiled = model(tokens, documents, positions).logits_BSV
    torch.testing.assert_close(eager, compiled, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_a_step_never_waits_for_the_device(case):
    """In bf16, as on a GPU: in fp32, experts in one grouped product would wait."""
    model, step = make_step(case)
    model.cuda()
    batches = [[part.cuda() for part in batch_of(number)] for number in range(3)]
    for number, batch in enumerate(batches):
        # The first step sets up what later ones find ready.
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            with torch.autocast("cuda", torch.bfloat16):
                objective, _, _ = step(*batch)
            objective.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
