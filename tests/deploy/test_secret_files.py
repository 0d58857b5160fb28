"""Secrets from files: what is taken, what is refused, and that workers beyond this machine need one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy import cli, secret_files
from deploy.launch import check_secret, read_config, with_keys
from engine_core.errors import ConfigError


def test_a_new_secret_can_be_read_by_its_owner_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "secret"
    assert cli.main(["secret", str(path)]) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(secret_files.read_secret(path)) == 64
    assert cli.main(["secret", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "reason"), [(b"", "holds 0 bytes"), (b"  short \n", "holds 5 bytes")])
def test_short_secrets(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        secret_files.read_secret(tmp_path / "secret")


def test_missing_files_name_their_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--secret-file .*none cannot be read: No such file"):
        secret_files.read_secret(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"--api-keys-file .*none cannot be read"):
        secret_files.read_keys(tmp_path / "none")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every file: modes say nothing")
def test_a_secret_that_others_can_read(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("x" * 32)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        secret_files.read_secret(path)


def test_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# team A\nsk-one\n\n  sk-two  \n")
    assert secret_files.read_keys(path) == ("sk-one", "sk-two")
    path.write_text("# nobody\n\n")
    with pytest.raises(ConfigError, match="holds no key"):
        secret_files.read_keys(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        secret_files.read_keys(path)
    config = read_config(["--gateway.api_keys", '["sk-three"]'], None)
    with pytest.raises(ConfigError, match="exclude each other"):
        with_keys(config, ("sk-one",))


@pytest.mark.parametrize("host", ["node", "0.0.0.0", "10.1.2.3"])
def test_listening_beyond_this_machine_needs_a_secret(host: str) -> None:
    config = read_config(["--fleet.host", host], None)
    with pytest.raises(ConfigError, match="secret"):
        check_secret(config, None)
    check_secret(config, b"x" * 32)


def test_loopback_needs_none() -> None:
    check_secret(read_config((), None), None)
