"""Captured passes against passes with caches that are not captured."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from moma.model.caches import Caches
from moma.model.captured_decoding import CapturedDecoder, CudaGraphs, Step
from moma.model.decoding import can_be_captured, prepare_decoding
from moma.model.depth import DepthRouter
from moma.model.dispatch import dispatch_for
from moma.model.routing import Routing, Threshold, uniform_routing
from moma.model.transformer import ModelConfig, Transformer
from tests.factories import set_thresholds
from tests.model.captured import capture_passes, never_waiting
from tests.model.test_caches import (
    ARCHITECTURES,
    CAUSAL,
    PADDING,
    VOCABULARY,
    append,
    build,
    some_tokens,
)

THRESHOLD = uniform_routing(Threshold())
CASES = [
    ("dense", CAUSAL),
    ("moe_2t2i", THRESHOLD),
    ("mod_moe_2t2i", THRESHOLD),
    ("token_4x", CAUSAL),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("moe_2t2i", CAUSAL),
            ("mod_moe_2t2i", CAUSAL),
            ("mod_null_2t2i", THRESHOLD),
            ("by_modality", THRESHOLD),
            ("all_depth", THRESHOLD),
        ]
    ),
]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _lengths_are_soon_exact(monkeypatch):
    monkeypatch.setattr("moma.model.caches._EXACT_EVERY", 7)


def decode(model: Transformer, passes: int = 9, routing: Routing = THRESHOLD) -> Iterator[Tensor]:
    """Yield the logits of single tokens after prompts, in a batch that changes."""
    random = torch.Generator().manual_seed(1)
    caches = model.new_caches(3)

    def add(*lengths: int) -> list[Tensor]:
        parts = [some_tokens(random, length) for length in lengths]
        return append(model, caches, parts, routing)

    add(58, 3, 20)
    for _ in range(passes):  # the first sequence outgrows the first 64 positions
        yield from add(1, 1, 1)
    caches.select([2, 0])
    yield from add(1, 1)
    added = model.new_caches(3)
    append(model, added, [some_tokens(random, length) for length in (5, 1, 4)], routing)
    caches.extend(added)
    yield from add(1, 1, 1, 1, 1)
    add(3, 3, 3, 3, 3)
    caches.keep([0, 2, 3, 1, 3])  # as of drafts
    for _ in range(passes):
        yield from add(1, 1, 1, 1, 1)


@pytest.mark.parametrize(("name", "routing"), CASES)
@torch.inference_mode()
def test_captured_passes_equal_others(name, routing, monkeypatch):
    model = build(name)
    expected = torch.cat(list(decode(model, routing=routing)))
    recordings = capture_passes(never_waiting(monkeypatch, model))
    found = torch.cat(list(decode(model, routing=routing)))
    assert recordings.replays == 9 + 1 + 1 + 9
    assert recordings.captures <= 7
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("computes", [False, True])
@torch.inference_mode()
def test_without_graphs_if_capturing_fails(computes, monkeypatch, capsys):
    model = never_waiting(monkeypatch, build("mod"))
    expected = torch.cat(list(decode(model)))

    def capture(step: Step) -> Step:
        if computes:
            step()
        raise RuntimeError("operation not permitted")

    model.captured_decoder = CapturedDecoder(capture, PADDING)
    torch.testing.assert_close(torch.cat(list(decode(model))), expected)
    assert capsys.readouterr().err == (
        "moma: capturing a CUDA graph failed; decoding goes on without "
        "(RuntimeError: operation not permitted)\n"
    )


@torch.inference_mode()
def test_two_batches_may_take_turns(monkeypatch):
    model = never_waiting(monkeypatch, build("mod_moe_2t2i"))
    expected = torch.cat(list(decode(model, 3)))
    capture_passes(model)
    both = list(zip(decode(model, 3), decode(model, 3), strict=True))
    for found in zip(*both, strict=True):
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_depth_routers_that_select_no_token_or_all(monkeypatch):
    model = never_waiting(monkeypatch, build("mod_moe_2t2i"))
    for threshold in (torch.inf, -torch.inf):
        for module in model.modules():
            if isinstance(module, DepthRouter):
                module.router.cutoff_means_3E[0] = threshold
        model.captured_decoder = None
        expected = torch.cat(list(decode(model, 8)))
        capture_passes(model)
        found = torch.cat(list(decode(model, 8)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_each_routing_is_captured(monkeypatch):
    model = never_waiting(monkeypatch, build("moe_2t2i"))
    expected: list[Tensor] = []
    found: list[Tensor] = []
    for results in (expected, found):
        for routing in (CAUSAL, THRESHOLD):
            results += decode(model, 2, routing)
        capture_passes(model)
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_what_a_failed_sequence_left_does_not_reach_the_next(monkeypatch):
    model, random = build("dense"), torch.Generator().manual_seed(1)
    capture_passes(never_waiting(monkeypatch, model))

    def append_after(length: int) -> Tensor:
        caches = model.new_caches(1)
        for size in (length, 1, 1, 1):
            found = append(model, caches, [some_tokens(random, size)])
        return found[0]

    embeddings = model.embedding.weight.clone()
    model.embedding.weight.fill_(torch.nan)
    assert append_after(124).isnan().all()
    model.embedding.weight.copy_(embeddings)
    # Its cache has 126 positions, fewer than the buffers.
    assert append_after(63).isfinite().all()


@torch.no_grad()
def test_batches_are_filled_up_and_results_are_not_overwritten():
    caches = build("dense").new_caches(4)
    for layer in caches.layers:
        layer.key_BTGC = layer.value_BTGC = torch.zeros(4, 1, 1, 1)
    decoder, hidden_411 = CapturedDecoder(lambda step: step, PADDING), torch.zeros(4, 1, 1)
    batches: list[list[int]] = []

    def compute(tokens_B1: Tensor, caches: Caches) -> Tensor:
        batches.append(tokens_B1.flatten().tolist())
        return hidden_411.add_(1)

    first_411 = decoder(torch.tensor([[5], [6], [7], [8]]), caches, CAUSAL, compute)
    caches.select([0, 1, 2])
    second_311 = decoder(torch.tensor([[6], [7], [8]]), caches, CAUSAL, compute)
    assert batches == [[5, 6, 7, 8], [6, 7, 8, PADDING]]
    assert first_411.flatten().tolist() == [1] * 4
    assert second_311.flatten().tolist() == [2] * 3


def test_passes_that_are_not_captured(monkeypatch):
    recordings = capture_passes(model := never_waiting(monkeypatch, build("dense")))
    random = torch.Generator().manual_seed(1)
    caches = model.new_caches(65)
    with torch.no_grad():
        append(model, caches, [some_tokens(random, 1) for _ in range(65)])  # nothing is cached
        append(model, caches, [some_tokens(random, 1) for _ in range(65)])  # too many
        caches.select([0])
        append(model, caches, [some_tokens(random, 2)])
        with torch.autocast("cpu", torch.bfloat16):
            cast = model.new_caches(1)
            for _ in range(2):
                append(model, cast, [some_tokens(random, 1)])
    assert recordings.captures == 0
    append(model, caches, [some_tokens(random, 1)])  # with gradients
    assert recordings.captures == 0
    with torch.no_grad():
        append(model, caches, [some_tokens(random, 1)])
    assert recordings.captures == 1


def test_a_step_is_computed_before_it_is_captured(monkeypatch):
    log: list[Any] = []

    class Stream:
        def __init__(self, device: torch.device | str):
            self.device = device

        def wait_stream(self, other: "Stream") -> None:
            log.append(f"{self.device} waits for {other.device}")

    class Graph:
        def pool(self) -> "Graph":
            return self

        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def block(*values: Any, **options: Any) -> Iterator[None]:
        log.append(values)
        yield
        log.append("end")

    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: Stream("current"))
    monkeypatch.setattr("torch.cuda.stream", block)
    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", block)
    capture, output = CudaGraphs(torch.device("cpu")), torch.ones(1)
    graphs: list[Graph] = []

    def step() -> Tensor:
        log.append("step")
        return output

    for _ in range(2):
        replay = capture(step)
        first, (stream,), warm_up, (graph, pool, captured_on), *others = log
        assert (first, warm_up) == ("cpu waits for current", "step")
        assert str(stream.device) == "cpu" and captured_on is stream
        assert pool is (graphs[-1] if graphs else None)
        assert others == ["step", "end", "end", "current waits for cpu"]
        graphs.append(graph)
        log.clear()
        assert replay() is output and log == ["replay"]
        log.clear()


def test_on_a_cpu_nothing_is_captured():
    model = build("dense", for_cpu=True)
    assert model.cpu_decoder is not None and model.captured_decoder is None


@pytest.mark.parametrize(
    ("groups", "capability", "hidden", "expected"),
    [
        ("dense", (8, 0), 60, True),
        ("moe_2t2i", (9, 0), 64, True),
        ("moe_2t2i", (10, 3), 64, True),
        ("moe_2t2i", (8, 0), 64, False),
        ("token_4x", (12, 0), 64, False),
        ("moe_1t1i", (9, 0), 60, False),
    ],
)
def test_experts_are_captured_only_if_their_kernel_does_not_wait(
    groups, capability, hidden, expected, monkeypatch
):
    config = ModelConfig(dim=32, layers=1, heads=2, groups=groups, hidden=hidden)
    model = Transformer(config, VOCABULARY, (0.5, 0.5))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    kernel = "moma.model.grouped.uses_kernel"
    monkeypatch.setattr(kernel, lambda x_TD, weight_EDF: weight_EDF.shape[2] % 8 == 0)
    assert can_be_captured(model) == expected


def test_nothing_is_captured_on_gpus_of_amd(monkeypatch):
    model = build("dense")
    assert can_be_captured(model)
    monkeypatch.setattr("torch.version.hip", "6.3")
    assert not can_be_captured(model)


@torch.inference_mode()  # as `Decoder.step`
def decode_on_gpu(model: Transformer) -> Tensor:
    return torch.cat(list(decode(model)))


@torch.no_grad()
def build_on_gpu(name: str) -> Transformer:
    """Weights are in bf16, except for those of routers, as in `load_run`."""
    config = ModelConfig(dim=32, layers=3, heads=4, **ARCHITECTURES[name])
    model = Transformer(config, VOCABULARY, (0.5, 0.5), dispatch=dispatch_for(GPU)).eval()
    model.initialize(0)
    set_thresholds(model, some_tokens(torch.Generator().manual_seed(1), 60).view(4, 15))
    model.to(GPU)
    for parameter_name, parameter in model.named_parameters():
        if ".router." not in parameter_name and ".auxiliary." not in parameter_name:
            parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dense", "moe_2t2i", "mod_moe_2t2i", "token_4x"])
def test_a_gpu_replays_graphs(name, monkeypatch):
    model = build_on_gpu(name)
    prepare_decoding(model)
    captured = model.captured_decoder
    if captured is None:
        pytest.skip("this GPU waits in a product of experts")
    # The same operations, each launched by Python.
    model.captured_decoder = CapturedDecoder(lambda step: step, VOCABULARY.padding)
    expected = decode_on_gpu(model)
    model.captured_decoder = captured
    replays: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        replays.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    found = decode_on_gpu(model)
    assert len(replays) == 9 + 1 + 1 + 9
    assert len(set(map(id, replays))) <= 7
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_graphs_of_a_dense_model_in_fp32_equal_passes_that_are_not_captured():
    model = build("dense").to(GPU)
    expected = decode_on_gpu(model)
    prepare_decoding(model)
    assert model.captured_decoder is not None
    torch.testing.assert_close(decode_on_gpu(model), expected, rtol=1e-3, atol=1e-3)
