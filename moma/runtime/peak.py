"""How fast a device multiplies matrices: what use of it is measured against (MFU)."""

import time

import torch


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of a few large products on this device, now."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use so far: of the GPU, or by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
