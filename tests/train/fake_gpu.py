"""A simulated GPU: tensors without numbers, of which PyTorch checks devices and dtypes.

An operation on tensors of different devices raises, and so does one whose result depends on data,
for which a GPU would be waited for. PyTorch for a CPU cannot compute gradients of such tensors.

It changes PyTorch itself, so that it belongs in a process of its own; see `run_in_child`.
"""

import ctypes
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moma.runtime.processes import start_pool
from tests.processes import forked

GPU = torch.device("cuda")
# With which this was tried: it depends on what PyTorch does not document.
TRIED = "2.13."
LIBRARY = Path(torch.__file__).parent / "lib" / "libc10.so"
SYMBOL = "_ZN3c104impl26device_guard_impl_registryE"


def reason_to_skip() -> str | None:
    """Why no GPU can be simulated here, if there is a reason."""
    if not torch.__version__.startswith(TRIED):
        return f"tried with PyTorch {TRIED}* only"
    if not torch.backends.cuda.is_built() and _find_registry() is None:
        return "this build of PyTorch has no registry of device guards"
    return None


def run_in_child(check: Callable[..., None], *arguments: object) -> None:
    """Run a function of a module on the simulated GPU, in a process that may crash."""
    with forked(), start_pool(1) as pool:
        if error := pool.submit(_run, check, *arguments).result():
            raise AssertionError(error)


def _run(check: Callable[..., None], *arguments: object) -> str | None:
    """Return the traceback: PyTorch's errors need not be picklable."""
    try:
        with simulated_gpu():
            check(*arguments)
    except Exception:
        return traceback.format_exc()
    return None


@contextmanager
def simulated_gpu() -> Iterator[None]:
    """In this context, until the process ends, PyTorch computes on the simulated GPU."""
    if not torch.backends.cuda.is_built():
        _install_guard()
    with (
        patch("torch.cuda.is_bf16_supported", lambda: True),
        patch("torch.cuda.get_device_capability", lambda device: (9, 0)),
        patch("torch.Tensor.pin_memory", lambda tensor: tensor),
        torch.compiler.set_stance("force_eager"),
        FakeTensorMode(),
        CopiesToHost(),
        # Without it, autocast is disabled.
        patch("torch.cuda.is_available", lambda: True),
    ):
        yield


def _find_registry() -> ctypes.Array[ctypes.c_void_p] | None:
    """PyTorch's device guards of the CPU and of GPUs."""
    try:
        return (ctypes.c_void_p * 2).in_dll(ctypes.CDLL(str(LIBRARY)), SYMBOL)
    except (OSError, ValueError):
        return None


def _install_guard() -> None:
    """Install PyTorch's device guard without effect, which a build for CPUs lacks.

    It is installed in place of a guard that finds no device: here an object whose methods return 0.
    """
    registry = _find_registry()
    assert registry is not None
    zero = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    address = ctypes.cast(zero, ctypes.c_void_p).value
    methods = (ctypes.c_void_p * 64)(*[address] * 64)
    empty = (ctypes.c_void_p * 1)(ctypes.addressof(methods))
    registry[1] = ctypes.addressof(empty)
    torch._C._ensureCUDADeviceGuardSet()  # replaces it, so that it may be freed


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


def move_to_gpu(model: nn.Module) -> None:
    """Replace the parameters and buffers of a model on the device `meta`.

    `Module.to_empty` cannot replace simulated tensors.
    """
    of_tensor: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            moved = of_tensor.get(tensor)
            if moved is None:
                moved = torch.empty_like(tensor, device=GPU, requires_grad=False)
                if isinstance(tensor, nn.Parameter):
                    moved = nn.Parameter(moved, False)
                of_tensor[tensor] = moved
            setattr(module, name, moved)


def assert_on_gpu(values: object) -> None:
    assert {each.device.type for each in tree_leaves(values) if isinstance(each, FakeTensor)} == {
        "cuda"
    }
