"""How the C library treats freed memory."""

import ctypes
import os

import torch

# Options of glibc's `mallopt`.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory(device: torch.device) -> None:
    """Let CPU tensors reuse the memory of freed tensors for the rest of this process.

    By default glibc returns large blocks to the system as soon as they are freed, and requests
    new, zero-filled pages for the next tensor (docs/results/data.md). With this, blocks of up to
    1 GiB stay in the process, and up to 2 GiB at the end of the heap. Does nothing with another C
    library, on a GPU, or if the environment configures the allocator.
    """
    set_by_user = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if device.type != "cpu" or set_by_user:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    # glibc before 2.35 accepts at most 32 MiB.
    if any(mallopt(_M_MMAP_THRESHOLD, size) for size in (2**30, 2**25)):
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
