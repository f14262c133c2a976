"""A training step is one graph for every architecture, for any data."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.overrides import TorchFunctionMode

from moma.data.batches.packing import NO_LABEL, Batch
from moma.model.architecture import ModelConfig
from moma.model.attention_kernels import attention_kernel
from moma.model.depth import DepthConfig
from moma.model.dispatch import TableSlots, dispatch_for
from moma.model.routers import Diagnostics, RouterRecord
from moma.model.routing import ExpertChoice, Threshold, uniform_routing
from moma.model.transformer import Transformer
from moma.runtime.optimizer import OptimizerConfig, make_optimizers
from moma.runtime.world import World, can_compile
from moma.train.stages import freeze_for_stage
from moma.train.step import LossFunction, Step, next_token_loss
from tests.factories import make_vocabulary
from tests.model.three_modalities import group

VOCABULARY = make_vocabulary(120, range(60, 120))
OVERLAPPING = (group("text", 2), group("image", 1), group("text image", 2))
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{
        name: {"groups": name}
        for name in (
            "dense", "moe_8x", "moe_1t1i", "moe_2t2i", "moe_3t1i", "moe_7t1i",
            "mod", "mod_moe_1t1i", "mod_moe_8x", "token_8x",
        )
    },
    "mod_moe_2t2i": {"groups": "mod_moe_2t2i", "kv_heads": 1, "norm": "pre"},
    "mod_by_sequence": {
        "groups": "mod",
        "depth": DepthConfig(scope="sequence"),
        "attention_mask": "causal",
    },
    "experts_by_sequence": {"groups": "mod_moe_2t2i", "depth": DepthConfig(scope="sequence")},
    "tied_batched": {
        "groups": "moe_2t2i",
        "tied_embeddings": True,
        "experts_implementation": "batched",
    },
    "grouped_unequal": {"groups": "moe_3t1i", "experts_implementation": "grouped"},
    "triton": {"groups": "moe_2t2i", "experts_implementation": "triton"},
    "overlapping": {"groups": OVERLAPPING},
    "overlapping_mod": {"groups": OVERLAPPING, "depth": DepthConfig()},
    "shared_slots": {  # of the single experts, beside a routed group
        "groups": (group("text", 2), group("text", 1), group("image", 1)),
        "depth": DepthConfig(),
        "experts_implementation": "grouped",
    },
    "null": {
        "groups": "mod_null_3t1i",
        "experts_implementation": "batched",
        "router_noise": True,
    },
    "noise": {"groups": "mod_moe_2t2i", "router_noise": True, "depth": {"noise": True}},
    "router_loss": {"groups": "mod_moe_2t2i", "depth": {"router_loss": 0.1}},
}  # fmt: skip
# Their layers are made of parts of the other architectures, or differentiated below.
COMBINED = {
    "dense", "experts_by_sequence", "grouped_unequal", "mod", "mod_moe_1t1i", "mod_moe_8x",
    "moe_1t1i", "moe_2t2i", "moe_3t1i", "moe_7t1i", "moe_8x", "noise", "overlapping", "router_loss",
    "shared_slots", "token_8x", "triton",
}  # fmt: skip
CASES = [
    pytest.param(case, marks=pytest.mark.slow) if case in COMBINED else case
    for case in ARCHITECTURES
]
SEQUENCES, LENGTH = 10, 8
CPU = torch.device("cpu")
CHOICE, FINISH = (
    uniform_routing(policy, record_selection=True)
    for policy in (ExpertChoice(), Threshold("static"))
)


def batch_of(step: int) -> Batch:
    """Return mixed tokens in documents of random lengths; every third batch has padding.

    All tokens are different: equal ones would tie, and rounding would decide between them.
    """
    random = np.random.default_rng(step)
    ids = 5 + random.permutation(VOCABULARY.size - 5)
    tokens = ids[: SEQUENCES * LENGTH].reshape(SEQUENCES, LENGTH)
    documents = (random.random((SEQUENCES, LENGTH)) < 0.2).cumsum(1)
    if step % 3 == 0:
        tokens[-1, 5:], documents[-1, 5:] = VOCABULARY.padding, -1
    labels = np.roll(tokens, -1, axis=1)
    labels[:, -1] = NO_LABEL
    labels[:, :-1][documents[:, :-1] != documents[:, 1:]] = NO_LABEL
    positions = np.tile(np.arange(LENGTH), (SEQUENCES, 1))
    return Batch(tokens, labels, documents, positions, images=0, padding=0)


class Trainer:
    """A model, its optimizer and the trainer's step, as in pre-training."""

    def __init__(self, case: str, layers: int = 2, device: torch.device = CPU):
        shape = {"dim": 16, "layers": layers, "heads": 2}
        config = ModelConfig.model_validate(shape | ARCHITECTURES[case])
        # The meta device stands for a GPU.
        gpu = torch.device("cuda") if device.type == "meta" else device
        dtype = torch.bfloat16 if gpu.type == "cuda" else torch.float32
        kernel = attention_kernel(gpu, dtype, config.dim // config.heads)
        dispatch = dispatch_for(gpu)
        self.model = Transformer(config, VOCABULARY, (0.5, 0.5), kernel, dispatch).to(device)
        self.model.initialize(0)
        freeze_for_stage(self.model, trains_routers=False)
        self.optimizer: Optimizer = make_optimizers(self.model, OptimizerConfig())[0]
        if device.type == "meta":  # fused AdamW does not support it
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = SGD([{"params": trained, "lr_scale": 1.0}], lr=0.1)
        self.gradients: list[torch.Tensor] = []
        self.optimizer.register_step_pre_hook(self._keep_gradients)
        self._world = World(device)

    def train(self, batch: Batch, loss_function: LossFunction) -> list[torch.Tensor]:
        """Take a step; return its sums, norm, clipped gradients and weights."""
        step = Step(self.model, [self.optimizer], loss_function, 0.5, self._world)
        sums, norm = step([batch], learning_rate=1e-3)
        assert self._world.device.type == "meta" or sums.isfinite().all()
        return [sums, norm, *self.gradients, *self.model.parameters()]

    def _keep_gradients(self, *_: Any) -> None:
        parameters = self.model.parameters()
        self.gradients = [p.grad.clone() for p in parameters if p.grad is not None]


class SmallestGap(TorchFunctionMode):
    """The smallest distance between a value that a `topk` selects and the next smaller one."""

    def __init__(self) -> None:
        super().__init__()
        self.value = math.inf

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is torch.Tensor.topk and args[1] < args[0].shape[-1]:
            ordered = args[0].detach().sort(dim=-1, descending=True).values
            gaps = ordered[..., args[1] - 1] - ordered[..., args[1]]
            self.value = min([self.value, *gaps[gaps.isfinite() & (gaps > 0)].tolist()])
        return function(*args, **(kwargs or {}))


def test_the_smallest_gap_is_that_of_the_last_selected_value():
    with SmallestGap() as gap:
        torch.tensor([[0.5, 4.0, 2.0], [1.0, 1.25, -torch.inf]]).topk(1, dim=1)
        torch.tensor([1.0, 2.0]).topk(2)
        torch.tensor([3.0, 3.0]).topk(1)  # as the scores of null experts, which are alike
    assert gap.value == 0.25


def assert_one_graph(case: str, layers: int, steps: int, **how: Any) -> None:
    """Model and loss are one graph, forward and backward; its steps equal eager ones.

    Steps in which rounding may decide what is selected are not compared; they are rare.
    """
    torch.compiler.reset()
    near_ties = 0
    loss_function = next_token_loss(z_loss=1e-5, compiled=False)
    compiled = torch.compile(loss_function, fullgraph=True, **how)
    trainer, eager = Trainer(case, layers), Trainer(case, layers)
    for number in range(steps):
        # Or selections would diverge.
        eager.model.load_state_dict(trainer.model.state_dict())
        eager.optimizer.load_state_dict(deepcopy(trainer.optimizer.state_dict()))
        torch.manual_seed(number)
        # After the first step, recompiling is an error.
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            result = trainer.train(batch_of(number), compiled)
        torch.manual_seed(number)
        with SmallestGap() as gap:
            expected = eager.train(batch_of(number), loss_function)
        if gap.value < 2e-6:
            near_ties += 1
        else:
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-3)
    assert near_ties <= max(1, steps // 25)


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_is_one_graph(case):
    """Only captured: this already finds graph breaks and recompilations.

    One layer, with mixture-of-depths if the architecture has it; layers without it are those of
    another architecture.
    """
    assert_one_graph(case, layers=1, steps=3, backend="eager")


@pytest.mark.slow  # layers are traced ahead of time below
def test_forward_and_backward_are_one_graph():
    """Traced ahead of time without generating code: mixture-of-depths and routers with noise."""
    assert_one_graph("noise", layers=1, steps=2, backend="aot_eager")


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_no_shape_and_no_branch_of_a_step_depends_on_the_data(case, monkeypatch):
    """On the meta device, which only computes shapes, reading a value is an error."""
    torch.compiler.reset()  # imports Dynamo, which reads what is replaced
    # Autocast does not support the meta device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    trainer = Trainer(case, device=torch.device("meta"))
    results = trainer.train(batch_of(0), next_token_loss(z_loss=1e-5, compiled=False))
    assert all(each.is_meta for each in results)


def test_no_shape_of_the_last_steps_depends_on_the_data(monkeypatch):
    torch.compiler.reset()  # as above
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    trainer = Trainer("mod_moe_2t2i", device=torch.device("meta"))
    results = trainer.train(batch_of(0), next_token_loss(routing=FINISH))
    assert all(each.is_meta for each in results)


def test_the_change_to_thresholds_compiles_a_layer_once_more():
    torch.compiler.reset()
    trainer, eager, graphs = Trainer("mod_moe_2t2i", 1), Trainer("mod_moe_2t2i", 1), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for unit in trainer.model.units():
        unit.compile(fullgraph=True, dynamic=False, backend=backend)
    for number in range(4):
        eager.model.load_state_dict(trainer.model.state_dict())
        loss_function = next_token_loss(routing=FINISH if number > 1 else CHOICE)
        results = [each.train(batch_of(number), loss_function) for each in (trainer, eager)]
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)
        assert len(graphs) == (1 if number < 2 else 2)


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler")
@pytest.mark.parametrize("case", ARCHITECTURES)
def test_compiled_code_of_every_architecture_equals_eager(case):
    # Noise must be sampled as in eager code.
    assert_one_graph(case, 2, steps=50, backend="inductor", options={"fallback_random": True})


@pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler")
def test_a_compiled_layer_equals_eager():
    """Layer by layer, as in training; every architecture is compiled behind the marker.

    This one has mixture-of-depths, experts selected by a router, and single experts.
    """
    model = Trainer("shared_slots", layers=1).model
    batch = batch_of(1)
    parts = [
        torch.from_numpy(part)
        for part in (batch.tokens_BS, batch.document_ids_BS, batch.positions_BS)
    ]
    eager = model(*parts).head
    for unit in model.units():
        unit.compile(fullgraph=True)
    torch.testing.assert_close(model(*parts).head, eager, atol=1e-4, rtol=1e-4)


def gradients_of(model: Transformer) -> list[torch.Tensor]:
    torch.manual_seed(0)  # of the noise
    model.zero_grad()
    tokens_BS = torch.from_numpy(batch_of(1).tokens_BS).to(model.embedding.weight.device)
    model(tokens_BS).head.square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("moe_2t2i", marks=pytest.mark.slow),  # the experts of the next one
        "noise",
        "tied_batched",
        "grouped_unequal",
    ],
)
def test_a_compiled_layer_is_differentiated_and_keeps_no_zeros_for_it(case):
    """Traced ahead of time without generating code; all layers are compiled behind the marker."""
    torch.compiler.reset()
    model, kept = Trainer(case, layers=1).model, []
    expected = gradients_of(model)
    for unit in model.units():
        unit.compile(fullgraph=True, backend="aot_eager_decomp_partition")

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.detach().clone())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.testing.assert_close(gradients_of(model), expected, atol=1e-4, rtol=1e-3)
    widths = [each.shape for each in kept if each.is_floating_point() and each.ndim == 2]
    assert (SEQUENCES * LENGTH, 16) in widths
    assert all(each.any() for each in kept if each.is_floating_point())


@pytest.mark.parametrize("case", ["mod_moe_2t2i", "null", "router_loss"])
def test_layers_return_nothing_that_torch_2_11_cannot_compile(case, monkeypatch):
    """There a graph cannot return what `_replace` makes; later versions can."""
    for kind in (Diagnostics, RouterRecord):
        monkeypatch.delattr(kind, "_replace")
    Trainer(case).train(batch_of(0), next_token_loss())


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler"),
            ],
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("case", ["moe_3t1i", "mod_moe_2t2i", "tied_batched", "grouped_unequal"])
def test_layers_compiled_with_the_slots_of_a_gpu_have_the_gradients_of_eager(case, device):
    """Torch 2.11 compiled wrong gradients without an error."""
    torch.compiler.reset()
    config = ModelConfig.model_validate({"dim": 16, "layers": 2, "heads": 2} | ARCHITECTURES[case])
    kernel = attention_kernel(torch.device(device), torch.float32, config.dim // config.heads)
    model = Transformer(config, VOCABULARY, (0.5, 0.5), kernel, TableSlots).to(device)
    model.initialize(0)
    expected = gradients_of(model)
    for unit in model.units():
        unit.compile(fullgraph=True, dynamic=False)
    torch.testing.assert_close(gradients_of(model), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "compiled"),
    [*((case, False) for case in ARCHITECTURES), ("moe_3t1i", True), ("mod_moe_2t2i", True)],
)
def test_a_step_never_waits_for_the_device(case, compiled):
    """In bf16, as on a GPU: in fp32, a grouped product would wait."""
    torch.compiler.reset()
    trainer = Trainer(case, device=torch.device("cuda"))
    if compiled:
        for unit in trainer.model.units():
            unit.compile(fullgraph=True, dynamic=False)
    loss_function = next_token_loss(z_loss=1e-5, compiled=compiled)
    step = Step(trainer.model, [trainer.optimizer], loss_function, 0.5, World(torch.device("cuda")))
    for number in range(3):
        # The first step allocates what later ones reuse.
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            step([batch_of(number)], learning_rate=1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
