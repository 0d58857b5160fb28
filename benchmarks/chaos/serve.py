"""`baton serve` with workers behind proxies: `python -m benchmarks.chaos.serve MODEL_DIR FLAGS...`."""

from __future__ import annotations

import sys
from pathlib import Path

from deploy import launch
from engine_core.types import Role

WORKER_CLASSES = {
    Role.PREFILL: "benchmarks.chaos.workers:ChaosPrefillWorker",
    Role.DECODE: "benchmarks.chaos.workers:ChaosDecodeWorker",
}

if __name__ == "__main__":
    sys.exit(
        launch.launch(
            launch.read_config(sys.argv[2:], None),
            model_dir=Path(sys.argv[1]),
            run_files=launch.default_run_files(),
            worker_classes=WORKER_CLASSES,
            gateway_class=launch.GATEWAY_CLASS,
            timeline=False,
            secret=None,
            ray_address=None,
        )
    )
