"""Passes of every architecture on a simulated GPU; see `fake_gpu`."""

from unittest.mock import patch

import pytest
import torch

from moma.generate.decode import drafts_alone
from moma.generate.sequence import DRAFTS
from moma.model.architecture import ModelConfig
from moma.model.attention_kernels import attention_kernel
from moma.model.captured_decoding import Step
from moma.model.decoding import prepare_decoding
from moma.model.dispatch import dispatch_for
from moma.model.float8_experts import use_float8_experts
from moma.model.routing import ExpertChoice, Threshold, uniform_routing
from moma.model.transformer import Transformer
from moma.train.statistics import Statistics
from moma.train.step import next_token_loss, router_loss, to_device
from tests.factories import OperationCounter
from tests.model.test_compile import ARCHITECTURES, VOCABULARY, batch_of
from tests.train.fake_gpu import GPU, assert_on_gpu, move_to_gpu, reason_to_skip, run_in_child

pytestmark = pytest.mark.skipif(bool(reason := reason_to_skip()), reason=reason or "")
KERNELS = {"varlen": (torch.bfloat16, False), "flex": (torch.bfloat16, True)}
# It uses most of what the others do.
CASES = [
    case if case == "mod_moe_2t2i" else pytest.param(case, marks=pytest.mark.slow)
    for case in ARCHITECTURES
]


def model_of(case: str, kernel: str = "varlen") -> Transformer:
    # Heads of 16, the least that `flex_attention` supports.
    config = ModelConfig.model_validate({"dim": 32, "layers": 2, "heads": 2} | ARCHITECTURES[case])
    dtype, deterministic = KERNELS[kernel]
    attention = attention_kernel(GPU, dtype, config.dim // config.heads, deterministic)
    with torch.device("meta"):
        model = Transformer(config, VOCABULARY, (0.5, 0.5), attention, dispatch_for(GPU))
    move_to_gpu(model)
    return model


def check_passes(case: str) -> None:
    model = model_of(case)
    check_training(model)
    check_decoding(model)


def check_training(model: Transformer) -> None:
    batch = batch_of(0)
    for policy in (ExpertChoice(), Threshold("static")):
        routing = uniform_routing(policy, record_selection=True)
        with torch.autocast("cuda", torch.bfloat16):
            output = next_token_loss(1e-5, routing=routing)(model, to_device(batch, GPU))
        assert_on_gpu(output)
        assert all(each.logits_NE.dtype == torch.float32 for each in output.routers)
        statistics = Statistics(model)
        statistics.add_routers(output.routers, to_device(batch, GPU).tokens_BS)
        assert_on_gpu([*statistics.sums.values(), output])


def check_float8(implementation: str) -> None:
    case = ARCHITECTURES["mod_moe_2t2i"] | {"experts_implementation": implementation}
    with patch.dict(ARCHITECTURES, float8=case):
        model = model_of("float8")
    use_float8_experts(model, "on", GPU)
    with OperationCounter() as counter:
        check_training(model)
    assert counter.counts["moma.float8_product.default"] > 0


def check_auxiliary_routers() -> None:
    with torch.autocast("cuda", torch.bfloat16):
        output = router_loss(model_of("mod_moe_2t2i"), to_device(batch_of(0), GPU))
    assert_on_gpu(output)
    logits = [each.auxiliary_logits_NE for each in output.routers]
    assert {None if each is None else each.dtype for each in logits} == {torch.float32}


@torch.no_grad()
def check_decoding(model: Transformer) -> None:
    """Weights become bf16, except for those of routers, as in `load_run`."""
    model.eval()
    for name, parameter in model.named_parameters():
        if ".router." not in name and ".auxiliary." not in name:
            parameter.data = parameter.data.bfloat16()
    caches, routing = model.new_caches(2), model.named_routing("causal", raises=False, checks=False)
    for size in (5, 1, 1):
        tokens_BS = torch.full((2, size), 7, device=GPU)
        logits = model(tokens_BS, routing=routing, caches=caches).head
        assert logits.shape == (2, size, VOCABULARY.size) and logits.dtype == torch.bfloat16
    assert_on_gpu(caches.state())
    assert drafts_alone(model) == DRAFTS
    captured: list[Step] = []

    def capture(step: Step) -> Step:
        captured.append(step)
        return step

    with (
        patch("moma.model.decoding.CudaGraphs", lambda device: capture),
        patch("torch.version.cuda", "13.0"),
    ):
        prepare_decoding(model, graphs=False)
        assert model.captured_decoder is None
        prepare_decoding(model)
        assert model.captured_decoder is not None
    for _ in range(2):
        tokens_BS = torch.full((2, 1), 7, device=GPU)
        logits = model(tokens_BS, routing=routing, caches=caches).head
        assert logits.shape == (2, 1, VOCABULARY.size) and logits.dtype == torch.bfloat16
    assert len(captured) == 1
    assert_on_gpu(caches.state())


def check_flex(case: str) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        assert_on_gpu(next_token_loss()(model_of(case, "flex"), to_device(batch_of(0), GPU)))


@pytest.mark.parametrize("case", CASES)
def test_training_and_decoding_never_wait_and_routers_compute_in_fp32(case):
    run_in_child(check_passes, case)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["sequential", "batched", "grouped"])
def test_experts_in_float8_never_wait(implementation):
    run_in_child(check_float8, implementation)


@pytest.mark.slow
def test_auxiliary_routers_learn_on_the_gpu():
    run_in_child(check_auxiliary_routers)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dense", "mod_moe_2t2i", "experts_by_sequence"])
def test_flex_attention_computes_a_training_pass(case):
    run_in_child(check_flex, case)
