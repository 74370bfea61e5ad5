"""What becomes of memory that tensors on the CPU give back."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep() -> None:
    """The C library keeps up to 256 MiB of freed memory for the next step, in this process and those that it forks.

    By itself it hands most of it back to the system after each step and asks for it anew, and each page of 4 KiB is a fault:
    5,500 a step of a small ViT, a twentieth of its time. Who has set MALLOC_... or GLIBC_TUNABLES knows better; another
    allocator and another C library don't notice.
    """
    chosen = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and not chosen:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes: larger ones come and go one by one, as ever
        mallopt(M_TRIM_THRESHOLD, 256 << 20)
