"""Freed memory is kept where there is a glibc and no GPU; each case in a process of its own."""

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, torch
from moma.runtime.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] != "none":
    keep_freed_memory(torch.device(sys.argv[1]))

def use():
    small, large = torch.ones(2**22), torch.ones(2**23)  # of 16 and 32 MiB

for _ in range(8):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(device):
    call = [sys.executable, "-c", COUNT_FAULTS, device]
    return int(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_tensors_are_made_in_memory_that_others_have_left():
    assert faults("cpu") < faults("cuda") / 4


def test_another_c_library_is_left_as_it_is(monkeypatch):
    import torch

    from moma.runtime import allocator

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    allocator.keep_freed_memory(torch.device("cpu"))
