"""What the C library does with memory that was freed."""

import ctypes

import torch

# Of glibc's `mallopt`.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 2**30
_MOST_KEPT = 2**31 - 1


def keep_freed_memory(device: torch.device) -> None:
    """Let a CPU's tensors be made in memory that others have left.

    glibc gives what is large back to the system as soon as it is freed, and takes it anew page by
    page, each of which is filled with zeros: up to a third of the time of a codec's convolutions
    (docs/results/data.md). Kept are tensors of up to 1 GiB, and at most 2 GiB that nobody uses.
    Other C libraries are left as they are, and so is everything where there is a GPU.
    """
    if device.type != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
    mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
