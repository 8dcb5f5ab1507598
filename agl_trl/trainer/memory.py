"""Giving memory back between passes."""

import ctypes
import platform

from accelerate.utils.memory import clear_device_cache


def give_back() -> None:
    """
    Return freed memory to the device and, from a process with glibc, to the system. Both allocators keep what a pass has
    freed, cut up by the little that stays of it, so that larger blocks, such as those of training, are taken anew beside it.
    """
    clear_device_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
