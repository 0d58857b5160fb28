"""A machine that is reached over ssh, played by this one: programs `ssh` and `rsync` that never leave it.

Ray's command line finds them first on the PATH. What runs "there" has a home, a PATH and a Ray directory of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.baton_process import ROOT, until

SSH = """#!/bin/bash
while [[ "$1" != *@127.0.0.1 ]]; do shift; done  # options
shift
exec env -i HOME={home} TERM=dumb USER=root setsid --wait bash -c "$*"
"""
RSYNC = r"""#!/bin/bash
source="${{@: -2:1}}" target="${{@: -1}}"
target="${{target#*:}}" target="${{target/#\~/{home}}}"
mkdir -p "$(dirname "$target")" && cp -r "$source" "$target"
"""
# `ray stop` would end every Ray on this machine.
RAY = """#!/bin/bash
case "$1" in
  stop) echo "$@" >> {home}/stopped ;;
  start) exec {ray} "$@" --node-ip-address=127.0.0.1 --dashboard-agent-listen-port=0 --object-store-memory=100000000 ;;
  *) exec {ray} "$@" ;;
esac
"""
BATON = """#!/bin/bash
exec {python} -m deploy.cli "$@"
"""
PROFILE = "export PATH={bin}:/usr/bin:/bin RAY_TMPDIR={temporary} PYTHONPATH={root}\n"


class SshNode:
    """See the module.

    Attributes:
        path: to be put before the PATH of who connects.
        home: of the user there.
    """

    def __init__(self, directory: Path) -> None:
        self.home = directory / "node"
        self._temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets need short paths
        self.path = directory / "connect"
        there = directory / "there"
        words = {
            "home": self.home,
            "python": sys.executable,
            "ray": Path(sys.executable).with_name("ray"),
            "bin": there,
            "temporary": self._temporary,
            "root": ROOT,
        }
        programs = ((self.path, {"ssh": SSH, "rsync": RSYNC}), (there, {"ray": RAY, "baton": BATON}))
        for place, named in programs:
            place.mkdir()
            for name, text in named.items():
                (place / name).write_text(text.format(**words))
                (place / name).chmod(0o755)
        self.home.mkdir()
        (self.home / ".bash_profile").write_text(PROFILE.format(**words))
        (self.home / ".bashrc").touch()

    @property
    def num_stops(self) -> int:
        """How often its Ray was told to stop."""
        told = self.home / "stopped"
        return len(told.read_text().splitlines()) if told.exists() else 0

    def processes(self) -> list[int]:
        """All that run there."""
        mark = f"RAY_TMPDIR={self._temporary}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def end(self) -> None:
        """Leave nothing of it."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not self.processes(), 10)
        shutil.rmtree(self._temporary, ignore_errors=True)
