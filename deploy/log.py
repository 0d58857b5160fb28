"""Log handlers: the only module that installs any. Every process writes one file; people see progress, not logs."""

from __future__ import annotations

import logging
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"
OURS = ("deploy", "router", "prefill_worker", "decode_worker", "kv_transfer", "engine_core", "benchmarks")


def log_to_file(directory: Path, process: str, level: int = logging.INFO) -> Path:
    """Send this process's log to `<directory>/<process>.log`: our packages at `level`, others from WARNING."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{process}.log"
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    for name in OURS:
        logging.getLogger(name).setLevel(level)
    return path
