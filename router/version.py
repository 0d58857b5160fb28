"""Which Baton this is."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """Of the installed package; 0.0.0 where it runs from a bare checkout."""
    try:
        return importlib.metadata.version("baton")
    except importlib.metadata.PackageNotFoundError:
        return "0.0.0"
