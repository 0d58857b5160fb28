"""`python -m deploy.wait_idle`: what a gateway's preStop runs, so that its streams end before it does.

Standard library only: it must start fast in a pod that is about to go.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable

POLL_S = 0.5
RUNNING = re.compile(r"^baton_streams_running (\S+)$", re.MULTILINE)


def wait_idle(
    read: Callable[[], str], clock: Callable[[], float], sleep: Callable[[float], None], until: float
) -> bool:
    """Whether the gateway became idle before `until` on the clock. One that does not answer is idle: it has ended."""
    while True:
        try:
            running = RUNNING.search(read())
        except (urllib.error.URLError, OSError):
            return True
        if running is not None and float(running[1]) == 0:
            return True
        if clock() >= until:
            return False
        sleep(POLL_S)


def main() -> int:
    """Wait; exit status 0 when idle, 1 when the time is up."""
    parser = argparse.ArgumentParser(prog="python -m deploy.wait_idle", description=__doc__)
    parser.add_argument("--url", required=True, help="of the gateway")
    parser.add_argument("--settle", type=float, required=True, metavar="S", help="wait so long first: new requests end")
    parser.add_argument("--timeout", type=float, required=True, metavar="S", help="for both together")
    known = parser.parse_args()
    until = time.monotonic() + known.timeout
    time.sleep(known.settle)

    def read() -> str:
        with urllib.request.urlopen(f"{known.url}/metrics", timeout=5) as reply:
            return str(reply.read().decode())

    return int(not wait_idle(read, time.monotonic, time.sleep, until))


if __name__ == "__main__":
    sys.exit(main())
