"""Freed memory is kept with glibc and without a GPU."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from moma.runtime import allocator

COUNT_FAULTS = """
import resource, torch
from moma.runtime.allocator import keep_freed_memory
torch.set_num_threads(1)

def use():
    small, large = torch.ones(2**22), torch.ones(2**23)  # of 16 and 32 MiB

for device in ("cuda", "cpu"):
    keep_freed_memory(torch.device(device))
    for _ in range(8):
        use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        use()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture
def unset(monkeypatch):
    """An environment that configures neither the allocator nor the size of pages."""
    # The command line, called in this process by other tests, asks for large pages.
    names = ("MALLOC_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")
    for name in [name for name in os.environ if name.startswith(names)]:
        monkeypatch.delenv(name)


def mallopt_calls(monkeypatch, accepted):
    """Calls of `mallopt`, where it accepts thresholds up to `accepted`."""
    calls = []

    def mallopt(option, value):
        calls.append((option, value))
        return option == -1 or value <= accepted

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    allocator.keep_freed_memory(torch.device("cpu"))
    return calls


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or [*map(int, platform.libc_ver()[1].split("."))] < [2, 35],
    reason="older versions accept at most 32 MiB",
)
def test_tensors_reuse_the_memory_of_freed_tensors(unset):
    command = [sys.executable, "-c", COUNT_FAULTS]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    default, keeping = map(int, result.stdout.split())
    assert keeping < default / 4


@pytest.mark.parametrize(
    ("accepted", "expected"),
    [
        (2**40, [(-3, 2**30), (-1, 2**31 - 1)]),
        (2**25, [(-3, 2**30), (-3, 2**25), (-1, 2**31 - 1)]),
        # With only a trim threshold it would map every block above 128 KiB.
        (0, [(-3, 2**30), (-3, 2**25)]),
    ],
)
def test_an_older_library_gets_a_lower_threshold(unset, monkeypatch, accepted, expected):
    assert mallopt_calls(monkeypatch, accepted) == expected


def test_settings_of_the_environment_are_kept(unset, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert mallopt_calls(monkeypatch, 2**40) == []


def test_other_c_libraries_are_not_changed(unset, monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    allocator.keep_freed_memory(torch.device("cpu"))
