"""Peak memory of a job and peak speed of a device."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moma.runtime.peak import (
    allocated_peak,
    datasheet_peak,
    matmul_peak,
    peak_flops,
    peak_memory,
)

CPU = torch.device("cpu")


def test_peak_memory_counts_what_is_held_at_once():
    def job() -> None:
        kept = torch.empty(2**18)  # 1 MiB
        for _ in range(3):
            torch.empty(2**19)
        del kept

    assert 3 * 2**20 <= allocated_peak(job, CPU) < 3 * 2**20 + 4096


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_peak_of_a_process_is_its_own_and_not_of_what_started_it():
    code = "from moma.runtime.peak import *; print(peak_memory(torch.device('cpu')))"
    held = torch.ones(2**28)  # 1 GiB
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert 2**25 < int(done.stdout) < 2**30 < peak_memory(CPU)
    del held


def test_a_system_that_does_not_list_the_peak_measures_it(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: "VmRSS:\t5 kB\n")
    assert 2**25 < peak_memory(CPU) < 2**40


def test_the_peak_is_the_fastest_product():
    assert matmul_peak(CPU, torch.float32) > 1e6


def test_the_peak_of_a_cpu_does_not_depend_on_its_load(monkeypatch):
    """A product takes 1 ms of two threads each, during 10 ms: the process rarely runs."""
    products, multiply = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: products.append(multiply(a, b)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(time, "process_time", lambda: 2e-3 * len(products))
    monkeypatch.setattr(time, "perf_counter", lambda: 1e-2 * len(products))
    assert matmul_peak(CPU, torch.float32) == pytest.approx(2 * 512**3 / 1e-3)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, 67e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA GeForce RTX 3060", torch.bfloat16, None),
        ("NVIDIA H100 PCIe", torch.float64, None),
    ],
)
def test_peaks_of_data_sheets(name, dtype, peak):
    assert datasheet_peak(name, dtype) == peak


def test_mfu_refers_to_the_data_sheet_of_a_known_gpu_and_else_to_a_measured_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == 989e12
    assert 1e6 < peak_flops(CPU, torch.float32) < 1e14
