"""How a process asks the system for memory; set before torch is imported. TGDPO_ALLOCATOR=0 leaves all as it is."""

import os
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # mallopt's names for them in glibc's malloc.h
CHOICES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prepare():
    """On CUDA, segments that grow, unless the user has chosen otherwise: packs differ in size, and blocks of fixed
    segments fit none of the next. On Linux's CPU, freed memory is kept: torch gives tensors of megabytes back and
    takes them again at every operation, which costs a page fault every 4 KiB."""
    if os.environ.get("TGDPO_ALLOCATOR") == "0":
        return
    if not any(name in os.environ for name in CHOICES):
        os.environ[CHOICES[0]] = "expandable_segments:True"
    if sys.platform == "linux":
        import ctypes  # which takes milliseconds: not before signals have their handlers

        try:
            libc = ctypes.CDLL(None)
            libc.mallopt(MMAP_MAX, 0)
            libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        except (AttributeError, OSError):
            pass  # no mallopt: another C library
