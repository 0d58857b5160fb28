"""The kernels of this machine's CPU, compiled and made known to XLA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.ffi

from engine_core.compiled_library import Sources, build_library, load_library

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Library:
    """Names of registered call targets.

    Attributes:
        gated: None where the CPU has no tiles for bfloat16.
    """

    matmul: str
    attention: str
    heads: str
    gated: str | None


def open_library(directory: Path, compilers: Sequence[str]) -> Library | None:
    """Register the kernels with XLA, compiling them where `directory` lacks them.

    Args:
        directory, compilers: see `build_library`.

    Returns:
        None where there is no compiler, or it fails; the log says why.
    """
    sources = _sources()
    path = build_library(sources, directory, compilers)
    functions = load_library(sources, path, keeps_lock=True) if path is not None else None
    if functions is None:
        return None
    identity = sources.identity()  # an executable that calls a kernel fits only its own
    library = Library(
        matmul=f"baton_matmul_{identity}",
        attention=f"baton_attention_{identity}",
        heads=f"baton_heads_{identity}",
        gated=f"baton_gated_{identity}" if functions.BatonHasTiles() else None,
    )
    targets = {
        library.matmul: functions.BatonMatmul,
        library.attention: functions.BatonAttention,
        library.heads: functions.BatonHeads,
        library.gated: functions.BatonGated,
    }
    for name, function in targets.items():
        if name is not None:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    return library


def _sources() -> Sources:
    include = Path(jax.ffi.include_dir())
    return Sources(
        name="baton_cpu",
        purpose="the CPU's kernels",
        otherwise="XLA does all",
        files=tuple(_HERE / name for name in ("matmul.cc", "attention.cc", "heads.cc")),
        headers=(
            *(
                _HERE / name
                for name in ("amx.h", "amx_attention.h", "amx_pieces.h", "common.h", "exp.h", "transpose.h")
            ),
            include / "xla" / "ffi" / "api" / "c_api.h",
        ),
        flags=("-ffp-contract=fast", f"-I{include}"),
    )
