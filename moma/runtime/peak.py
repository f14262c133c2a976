"""Peak throughput of matrix products and peak memory of a device.

The peak that MFU refers to, in logs, benchmarks and plans alike, is that of the data sheet for GPUs
in `_DATA_SHEETS`, and the fastest of a few measured matrix products on any other device; those of
a CPU are measured in processor time, which does not depend on what else the machine does.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile

# FLOP/s without sparsity in bf16 (accumulated in fp32) and in fp32 (without TF32), by a part of the
# device's name; the first part that is found counts.
_DATA_SHEETS = {
    "A100": (312e12, 19.5e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H200 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "B200": (2250e12, 75e12),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The peak FLOP/s of a device that MFU refers to; see the module's docstring."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return datasheet_peak(name, dtype) or matmul_peak(device, dtype)


def datasheet_peak(name: str, dtype: torch.dtype) -> float | None:
    """The peak FLOP/s of a GPU in its data sheet, by its name; None if that is not known here."""
    for part, (bf16, fp32) in _DATA_SHEETS.items():
        if part in name:
            return {torch.bfloat16: bf16, torch.float32: fp32}.get(dtype)
    return None


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few large matrix products, measured now on this device."""
    on_gpu = device.type == "cuda"
    size, threads = (8192, 1) if on_gpu else (512, torch.get_num_threads())
    clock = time.perf_counter if on_gpu else time.process_time  # the latter adds up all threads
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        start = clock()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, clock() - start)
    return 2 * size**3 * threads / best


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux's `ru_maxrss` also counts what the process that started this one held.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    if peaks := [line.split()[1] for line in lines if line.startswith("VmHWM:")]:
        return int(peaks[0]) * 1024
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def allocated_peak(job: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that a job allocates, in addition to what was allocated before."""
    gc.collect()  # what would be freed during the job hides what it allocates
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        job()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        job()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    in_time = sorted(changes, key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in in_time), initial=0))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
