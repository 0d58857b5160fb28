"""The environment of a process that compiles with libtpu. libtpu reads it once, as the process loads it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

from engine_core.errors import ConfigError

_QUIET = {
    "JAX_PLATFORMS": "cpu",  # never look for a TPU to run on
    "TPU_SKIP_MDS_QUERY": "1",  # never ask a cloud's metadata server what this machine is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v6e-8",  # must be a known one; the slice compiled for is named in the call
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # else a lock file allows one process per machine
    "JAX_COMPILATION_CACHE_DIR": "",  # entries of a compile-only client cannot be read back, only warned about
}


def require_libtpu() -> None:
    """Refuse early, and say what to install.

    Raises:
        ConfigError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "compiling for a TPU needs libtpu, which is not installed: "
            "pip install libtpu (in a checkout: pip install -e '.[aot]'); no TPU is needed"
        )


def compiler_environment(base: Mapping[str, str], flags: Sequence[str]) -> dict[str, str]:
    """Variables for a child process that imports jax and compiles for a TPU which is not there.

    Args:
        base: variables to start from.
        flags: of libtpu, `--xla_...`; they replace what LIBTPU_INIT_ARGS says.
    """
    return {**base, **_QUIET, "LIBTPU_INIT_ARGS": " ".join(flags)}


def schedule_dump_flags(directory: str) -> list[str]:
    """Have the compiler write its schedule (packed bundles, use of units per bundle, allocations) to a directory.

    One kernel per directory: a second of the same name replaces the first.
    """
    return [
        f"--xla_jf_dump_to={directory}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_hlo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=.*(packed-bundles-post-ra|post-delay-converter|pre-delay).*",
    ]
