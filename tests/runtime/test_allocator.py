"""Freed memory is kept where there is a glibc and no GPU."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from moma.runtime import allocator

COUNT_FAULTS = """
import resource, sys, torch
from moma.runtime.allocator import keep_freed_memory
torch.set_num_threads(1)
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


@pytest.fixture
def unset(monkeypatch):
    """An environment that says nothing of the allocator, nor of the size of pages."""
    # The command line, called in this process by other tests, asks for large pages.
    names = (*allocator._SET_BY_USER, "THP_MEM_ALLOC_ENABLE")
    for name in [name for name in os.environ if name.startswith(names)]:
        monkeypatch.delenv(name)


def faults(device):
    call = [sys.executable, "-c", COUNT_FAULTS, device]
    return int(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


def calls_to(monkeypatch, accepted):
    """What `mallopt` is asked for, where it accepts no threshold above one."""
    calls = []

    def mallopt(option, value):
        calls.append((option, value))
        return option == -1 or value <= accepted

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    allocator.keep_freed_memory(torch.device("cpu"))
    return calls


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or [*map(int, platform.libc_ver()[1].split("."))] < [2, 35],
    reason="older ones take no more than 32 MiB",
)
def test_tensors_are_made_in_memory_that_others_have_left(unset):
    assert faults("cpu") < faults("cuda") / 4


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        (2**40, [(-3, 2**30), (-1, 2**31 - 1)]),
        (2**25, [(-3, 2**30), (-3, 2**25), (-1, 2**31 - 1)]),
        # To trim alone would make it map everything above 128 KiB anew.
        (0, [(-3, 2**30), (-3, 2**25)]),
    ],
)
def test_an_older_library_is_asked_for_less(unset, monkeypatch, accepted, expected):
    assert calls_to(monkeypatch, accepted) == expected


def test_what_the_environment_sets_stays(unset, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert calls_to(monkeypatch, 2**40) == []


def test_another_c_library_is_left_as_it_is(unset, monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    allocator.keep_freed_memory(torch.device("cpu"))
