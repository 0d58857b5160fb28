"""`baton serve` with fakes: python -m tests.deploy.serve_fake PORT DIRECTORY [RAY_ADDRESS [serve flags]]."""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path

from deploy import launch
from engine_core.types import Role


def main(port: str, directory: str, ray_address: str | None = None, *flags: str) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `baton serve` respects that it is ignored, as a test runner may do
    home = Path(directory)
    config = launch.read_config(["--port", port, *flags], None)
    fakes = importlib.import_module("tests.deploy.fakes").__name__
    return launch.launch(
        config,
        model_dir=home,
        run_files=launch.default_run_files(),
        worker_classes={Role.PREFILL: f"{fakes}:FakePrefillWorker", Role.DECODE: f"{fakes}:FakeDecodeWorker"},
        gateway_class="tests.deploy.fake_gateway:FakeGateway",
        timeline=True,
        secret=b"a secret of the test" if ray_address else None,
        ray_address=ray_address or None,
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
