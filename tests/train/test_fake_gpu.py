"""Passes on a simulated GPU: tensors without numbers, of which PyTorch checks devices and dtypes.

An operation on tensors of different devices raises, and so does one whose result depends on data,
for which a GPU would be waited for. PyTorch for a CPU cannot compute gradients of such tensors.
"""

import ctypes
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moma.model.architecture import ModelConfig
from moma.model.attention_kernels import attention_kernel
from moma.model.dispatch import dispatch_for
from moma.model.routing import BatchChoice, Threshold, uniform_routing
from moma.model.transformer import Transformer
from moma.train.statistics import Statistics
from moma.train.step import next_token_loss, router_loss, to_device
from tests.model.test_compile import ARCHITECTURES, VOCABULARY, batch_of

GPU = torch.device("cuda")
# Between them, these use most of what the others do.
CASES = [
    case if case in ("mod_moe_2t2i", "null") else pytest.param(case, marks=pytest.mark.slow)
    for case in ARCHITECTURES
]
KERNELS = {"varlen": (torch.bfloat16, False), "flex": (torch.bfloat16, True)}


class CopiesToHost(TorchDispatchMode):
    """Refuses operations that return a tensor on the CPU, given one on the GPU."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        given, found = (
            {each.device.type for each in tree_leaves(values) if isinstance(each, torch.Tensor)}
            for values in ((arguments, options), result)
        )
        assert "cuda" not in given or "cpu" not in found, f"{operation} copies to the host"
        return result


@pytest.fixture(scope="module")
def guard():
    """PyTorch's device guard without effect, which a build for CPUs lacks.

    It is installed in place of a guard that finds no device: here an object whose methods return 0.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    symbol = "_ZN3c104impl26device_guard_impl_registryE"
    if not hasattr(library, symbol):
        pytest.skip("this build of PyTorch has no such registry")
    registry = (ctypes.c_void_p * 2).in_dll(library, symbol)
    if registry[1]:  # a build for GPUs
        yield
        return
    zero = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    address = ctypes.cast(zero, ctypes.c_void_p).value
    methods = (ctypes.c_void_p * 64)(*[address] * 64)
    empty = (ctypes.c_void_p * 1)(ctypes.addressof(methods))
    registry[1] = ctypes.addressof(empty)
    torch._C._ensureCUDADeviceGuardSet()
    yield
    registry[1] = None


@pytest.fixture
def gpu(guard, monkeypatch):
    """In this context PyTorch computes on the simulated GPU."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    with torch.compiler.set_stance("force_eager"), FakeTensorMode(), CopiesToHost():
        yield


def model_of(case: str, kernel: str = "varlen") -> Transformer:
    # Heads of 16, the least that `flex_attention` supports.
    config = ModelConfig.model_validate({"dim": 32, "layers": 2, "heads": 2} | ARCHITECTURES[case])
    dtype, deterministic = KERNELS[kernel]
    attention = attention_kernel(GPU, dtype, config.dim // config.heads, deterministic)
    with torch.device("meta"):
        model = Transformer(config, VOCABULARY, (0.5, 0.5), attention, dispatch_for(GPU))
    on_gpu = {
        tensor: torch.empty_like(tensor, device=GPU, requires_grad=False)
        for tensor in (*model.parameters(), *model.buffers())
    }
    for module in model.modules():  # `Module.to_empty` cannot replace simulated tensors
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(on_gpu[parameter], False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else on_gpu[buffer]
    return model


def assert_on_gpu(values: object) -> None:
    assert {each.device.type for each in tree_leaves(values) if isinstance(each, FakeTensor)} == {
        "cuda"
    }


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("case", CASES)
def test_a_training_pass_never_waits_and_routes_in_fp32(case):
    model, batch = model_of(case), batch_of(0)
    for policy in (BatchChoice(), Threshold("static")):
        routing = uniform_routing(policy, record_selection=True)
        with torch.autocast("cuda", torch.bfloat16):
            output = next_token_loss(1e-5, routing=routing)(model, to_device(batch, GPU))
        assert_on_gpu(output)
        assert all(each.logits_NE.dtype == torch.float32 for each in output.routers)
        statistics = Statistics(model)
        statistics.add_routers(output.routers, to_device(batch, GPU).tokens_BS)
        assert_on_gpu([*statistics.sums.values(), output])


@pytest.mark.usefixtures("gpu")
@pytest.mark.slow
@pytest.mark.parametrize("case", ["dense", "mod_moe_2t2i", "experts_by_sequence"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_a_training_pass(case):
    model = model_of(case, "flex")
    with torch.autocast("cuda", torch.bfloat16):
        assert_on_gpu(next_token_loss()(model, to_device(batch_of(0), GPU)))


@pytest.mark.usefixtures("gpu")
def test_auxiliary_routers_learn_on_the_gpu():
    with torch.autocast("cuda", torch.bfloat16):
        output = router_loss(model_of("mod_moe_2t2i"), to_device(batch_of(0), GPU))
    assert_on_gpu(output)
    logits = [each.auxiliary_logits_NE for each in output.routers]
    assert {None if each is None else each.dtype for each in logits} == {torch.float32}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_decoding_a_few_tokens_never_waits(case):
    """Weights are bf16, except for those of routers, as in `load_run`."""
    model = model_of(case).eval()
    for name, parameter in model.named_parameters():
        if ".router." not in name and ".auxiliary." not in name:
            parameter.data = parameter.data.bfloat16()
    caches, routing = model.new_caches(2), model.named_routing("causal", raises=False, checks=False)
    for size in (5, 1, 1):
        tokens_BS = torch.full((2, size), 7, device=GPU)
        logits = model(tokens_BS, routing=routing, caches=caches).head
        assert logits.shape == (2, size, VOCABULARY.size) and logits.dtype == torch.bfloat16
    assert_on_gpu([caches.tokens.length_B, *(layer.key_BTGC for layer in caches.layers)])
