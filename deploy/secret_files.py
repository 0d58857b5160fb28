"""Secrets come from files, never from flags or the environment, which other users and crash reports can see."""

from __future__ import annotations

import os
from pathlib import Path

from deploy.ray_local import create_token
from engine_core.errors import ConfigError

MIN_SECRET_BYTES = 16
OTHERS = 0o077


def read_secret(path: Path) -> bytes:
    """The cluster's shared secret: the file's content without white space around it.

    Raises:
        ConfigError: it cannot be read, is short, or others on this machine may read it.
    """
    secret = _read(path, "--secret-file").strip()
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"--secret-file {path} holds {len(secret)} bytes, at least {MIN_SECRET_BYTES} are needed; "
            f"`baton secret {path}` writes a new one"
        )
    return secret


def read_keys(path: Path) -> tuple[str, ...]:
    """API keys, one per line; empty lines and lines that start with # do not count.

    Raises:
        ConfigError: it cannot be read or holds none: an empty file must not open the gateway to everyone.
    """
    try:
        lines = [line.strip() for line in _read(path, "--api-keys-file").decode().splitlines()]
    except UnicodeDecodeError:
        raise ConfigError(f"--api-keys-file {path} is not UTF-8 text") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--api-keys-file {path} holds no key")
    return keys


def write_secret(path: Path) -> None:
    """A new secret that only this user can read.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        create_token(path)
    except FileExistsError:
        raise ConfigError(f"{path} exists already; remove it first if its secret shall no longer count") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None


def _read(path: Path, flag: str) -> bytes:
    """The content; a file of this user's home must not be readable by others (a mounted Kubernetes secret may be)."""
    try:
        status = path.stat()
        if status.st_uid == os.getuid() and status.st_uid != 0 and status.st_mode & OTHERS:
            raise ConfigError(f"{flag} {path} can be read by others; `chmod 600 {path}`")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror or error}") from None
