"""What the C library does with memory that was freed."""

import ctypes
import os

import torch

# Of glibc's `mallopt`.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Before 2.35 glibc takes nothing over 32 MiB.
_LARGEST_KEPT = (2**30, 2**25)
_END_KEPT = 2**31 - 1
_SET_BY_USER = ("MALLOC_", "GLIBC_TUNABLES")


def keep_freed_memory(device: torch.device) -> None:
    """Let a CPU's tensors be made in memory that others have left, as long as this process lives.

    glibc gives what is large back to the system as soon as it is freed, and takes it anew page by
    page, each of which is filled with zeros: a third of a codec's time, before it encoded in small
    parts (docs/results/data.md). Kept are tensors of up to 1 GiB: whatever lies between others,
    and 2 GiB at the end. Other C libraries are left as they are, and so is everything where there
    is a GPU or the environment sets the allocator.
    """
    if device.type != "cpu" or any(name.startswith(_SET_BY_USER) for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return
    if any(mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGEST_KEPT):
        mallopt(_M_TRIM_THRESHOLD, _END_KEPT)
