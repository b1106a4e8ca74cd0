"""Keep freed memory in the process: the difference between computing and clearing pages, when training on a CPU."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # <malloc.h>
_ALL = 2**31 - 1

freed_memory_is_kept = False
"""Whether `keep_freed_memory` took effect in this process; reports state it."""


def keep_freed_memory() -> bool:
    """Have glibc reuse large freed blocks instead of handing them back to the kernel.

    By default every activation of some megabytes is a fresh mapping, cleared page by page at first touch, in every
    step; reuse saves the clearing, in training and in inference of large batches. The price is that the process keeps
    its peak memory.

    It is a choice for a whole process, so only the command line makes it, and no import of dyncompress.

    Returns:
        Whether the allocator took both settings; False on other C libraries, which don't have them.
    """
    global freed_memory_is_kept
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        freed_memory_is_kept = all([mallopt(setting, _ALL) for setting in (_MMAP_THRESHOLD, _TRIM_THRESHOLD)])
    return freed_memory_is_kept
