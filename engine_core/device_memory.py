"""How full the memory of some devices is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jax


def device_memory(devices: Sequence[jax.Device]) -> tuple[int, int]:
    """Bytes in use and bytes there, of all devices together; of this process and this machine where they are CPUs."""
    if devices[0].platform == "cpu":
        page = os.sysconf("SC_PAGE_SIZE")
        return _resident_pages() * page, os.sysconf("SC_PHYS_PAGES") * page
    stats = [device.memory_stats() or {} for device in devices]
    used = sum(int(of_one.get("bytes_in_use", 0)) for of_one in stats)
    return used, sum(int(of_one.get("bytes_limit", 0)) for of_one in stats)


def _resident_pages() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):  # not Linux
        return 0
