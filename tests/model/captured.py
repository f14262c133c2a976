"""Decoding by captured passes without a GPU.

The passes are computed on the CPU as on a GPU: without reading any number on the host.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from moma.model.caches import Caches
from moma.model.captured_decoding import CapturedDecoder, Step
from moma.model.experts import ExpertGroup
from moma.model.routing import MAX_UNSYNCHRONIZED_TOKENS
from moma.model.transformer import Transformer

# Their results, or the shapes of these, have to be known on the host.
WAITING = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal}


class Recorder(TorchDispatchMode):
    """Records operations, and repeats them on the same memory without the code that called them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        assert operation.overloadpacket not in WAITING, f"{operation} waits for the device"
        result = operation(*arguments, **(options or {}))
        self.operations.append((operation, arguments, options or {}, result))
        return result

    def replay(self, output: Tensor) -> Tensor:
        """Repeat the operations and return what takes the place of a recorded tensor."""
        by_id: dict[int, Tensor] = {}
        for operation, arguments, options, recorded in self.operations:
            arguments, options = tree_map_only(
                Tensor, lambda x: by_id.get(id(x), x), (arguments, options)
            )
            result = operation(*arguments, **options)
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                by_id[id(old)] = new
        return by_id[id(output)]


class Recordings:
    """A `Capture` that records; counts captured and replayed passes."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, step: Step) -> Step:
        self.captures += 1
        with Recorder() as recorder:
            output = step()

        def replay() -> Tensor:
            self.replays += 1
            return recorder.replay(output)

        return replay


def never_waiting(monkeypatch: Any, model: Transformer) -> Transformer:
    """Let passes over few tokens of a model on a CPU not depend on data, as on a GPU."""
    for module in ("routing", "experts"):
        name = f"moma.model.{module}.may_synchronize"
        monkeypatch.setattr(name, lambda x_N: len(x_N) > MAX_UNSYNCHRONIZED_TOKENS)
    for group in model.modules():
        if isinstance(group, ExpertGroup):
            group.product = _masked_product
    device = torch.device("cpu")
    monkeypatch.setattr(
        model, "new_caches", lambda count: Caches(model.config, count, device, waits=False)
    )
    return model


def _masked_product(x_TD: Tensor, weights: Sequence[Tensor], end_E: Tensor | None) -> Tensor:
    """`grouped_product` without reading the ends on the host."""
    assert end_E is not None
    expert_T = (torch.arange(len(x_TD))[:, None] >= end_E).sum(1)
    return torch.einsum("td,tdf->tf", x_TD, weights[0][expert_T])


def capture_passes(model: Transformer) -> Recordings:
    """Let a model on a CPU decode by recorded passes from now on."""
    recordings = Recordings()
    model.captured_decoder = CapturedDecoder(recordings, model.vocabulary.padding)
    return recordings
