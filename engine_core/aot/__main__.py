"""The process that compiles a plan: `python -m engine_core.aot REQUEST.json RESULT.json`; progress on standard output.

A process of its own, since libtpu wants its environment before jax is imported, and may abort.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engine_core.aot.plan import PlanRequest, make_plan
from engine_core.errors import ConfigError
from engine_core.types import Role


def main(request_path: str, result_path: str) -> None:
    """Read, plan, write: the plan, or one `error`."""
    asked = json.loads(Path(request_path).read_text())
    request = PlanRequest(**{**asked, "roles": tuple(map(Role, asked["roles"]))})
    try:
        result = make_plan(request, _say)
    except ConfigError as error:
        result = {"error": str(error)}
    Path(result_path).write_text(json.dumps(result))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
