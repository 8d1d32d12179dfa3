# SPDX-License-Identifier: Apache-2.0
"""How much memory of its own a process holds, seen from outside.

Counted is RssAnon of /proc/PID/status (Linux): pages that belong to the process alone. Pages of mapped files do not
count; the kernel takes them back when it likes."""

import time
from collections.abc import Callable
from pathlib import Path

POLL_S = 0.0005


def anonymous_bytes(pid: int) -> int:
    """Now; 0 if there is no such process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(found[0]) * 1024 if found else 0


def peak_anonymous_bytes(pid: int, *, until: Callable[[], bool]) -> int:
    """The largest value until `until()` is true."""
    peak = anonymous_bytes(pid)
    while not until():
        peak = max(peak, anonymous_bytes(pid))
        time.sleep(POLL_S)
    return peak
