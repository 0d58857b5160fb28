"""Ray's settings in the deploy files exist in the Ray that is installed: a misspelt one would change nothing."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import ray
from ray._common.usage import usage_constants

ROOT = Path(__file__).parents[2]
OURS = {"RAY_HEAD_IP"}  # set by `ray up` for the start commands


def test_every_ray_setting_in_the_deploy_files_exists() -> None:
    files = [path for name in ("ray", "k8s", "sky", "docker") for path in (ROOT / "deploy" / name).rglob("*")]
    text = "\n".join(path.read_text() for path in files if path.is_file())
    names = set(re.findall(r"\bRAY_\w+", text)) - OURS
    assert {"RAY_AUTH_MODE", "RAY_gcs_rpc_server_reconnect_timeout_s", "RAY_gcs_storage"} <= names
    with (Path(ray.__file__).parent / "_raylet.so").open("rb") as file:
        library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        unknown = {
            name
            for name in names - {usage_constants.USAGE_STATS_ENABLED_ENV_VAR}
            # settings of Ray's core are there without the prefix
            if library.find(f"{name.removeprefix('RAY_') if name[4].islower() else name}\0".encode()) < 0
        }
        library.close()
    assert not unknown
