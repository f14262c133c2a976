"""Peak memory of a job and peak speed of a device."""

import torch

from moma.runtime.peak import allocated_peak, matmul_peak

CPU = torch.device("cpu")


def test_peak_memory_counts_what_is_held_at_once():
    def job() -> None:
        kept = torch.empty(2**18)  # 1 MiB
        for _ in range(3):
            torch.empty(2**19)
        del kept

    assert 3 * 2**20 <= allocated_peak(job, CPU) < 3 * 2**20 + 4096


def test_the_peak_is_the_fastest_product():
    assert matmul_peak(CPU, torch.float32) > 1e6
