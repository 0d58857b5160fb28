"""A configuration with a field of each type."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

from engine_core.config import CacheConfig, EngineConfig


class Level(Enum):
    LOW = 1
    HIGH = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    """A section whose defaults the outer class changes."""

    ratio: float = 0.5  # share
    names: tuple[str, ...] = ()
    span: tuple[int, int] = (1, 2)
    limit: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    """One field of each type."""

    inner: Inner = field(default_factory=lambda: Inner(ratio=0.25, names=("a",)))
    engine: EngineConfig = field(default_factory=EngineConfig)
    path: Path = Path("/tmp")
    level: Level = Level.LOW
    mode: Literal["x", "y"] = "x"
    no_wait: bool = False
    label: str | None = None
    sizes: tuple[int, ...] = (1, 2)
    text: str = "long"  # a comment behind a value
    plain: int = 0


@dataclass(frozen=True, kw_only=True)
class Needs:
    """A section without defaults."""

    port: int
    host: str = "h"


@dataclass(frozen=True, kw_only=True)
class Root:
    """Requires a field of its section."""

    needs: Needs


@dataclass(frozen=True, kw_only=True)
class Deep:
    """A default two sections down, and a field that nobody may set."""

    outer: Outer = Outer(engine=EngineConfig(cache=CacheConfig(page_size=7)))
    computed: int = field(init=False, default=1)


ALIASES = {"model": "engine.model.path", "max-model-len": "engine.batch.max_model_len", "": "engine."}
