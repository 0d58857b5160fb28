"""`python -m deploy.monitoring`: write boards, rules, alerts, scrape configuration and docs/metrics.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.monitoring.files import RUNBOOK, generate


def main() -> int:
    """Write every file below `--out`."""
    parser = argparse.ArgumentParser(prog="python -m deploy.monitoring", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), help="root of the repository (default: here)")
    parser.add_argument("--runbook", default=RUNBOOK, metavar="URL", help="what alerts link to (default %(default)s)")
    known = parser.parse_args()
    for path, text in generate(known.runbook).items():
        target = known.out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        sys.stdout.write(f"{target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
