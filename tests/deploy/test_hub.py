"""A model by its hub id: huggingface_hub's own client against a hub on this machine."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"architectures": ["Qwen3ForCausalLM"]}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"\2\0\0\0\0\0\0\0{}",
    "consolidated.safetensors": b"the same weights once more",
    "onnx/model.json": b"{}",
    "README.md": b"# Tiny",
}
REFUSALS = {"acme/gated": (403, "GatedRepo"), "acme/absent": (401, "RepoNotFound")}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP API that a download of `acme/tiny` uses."""

    def do_GET(self) -> None:
        repo = "/".join(self.path.removeprefix("/api/models").split("/")[1:3])
        if repo in REFUSALS:
            status, code = REFUSALS[repo]
            return self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": "no"})
        if self.path.startswith("/api/models/acme/tiny/tree/"):
            tree = [{"type": "file", "path": name, "size": len(FILES[name]), "oid": name} for name in FILES]
            return self._answer(200, json.dumps(tree).encode(), {})
        if self.path.startswith("/api/models/acme/tiny"):
            siblings = [{"rfilename": name} for name in FILES]
            return self._answer(200, json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}).encode(), {})
        name = self.path.split(f"/resolve/{COMMIT}/")[-1]
        if name not in FILES:
            return self._answer(404, b"", {})
        self.server.asked.append(name)
        return self._answer(200, FILES[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args) -> None: ...


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def resolve(endpoint: str, name: str, home: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because the hub's client reads its settings when it is imported."""
    code = (
        "import sys; from deploy.checkpoint import resolve; from engine_core.errors import CheckpointError\n"
        "try: print(resolve(sys.argv[1], '', lambda text: None))\n"
        "except CheckpointError as error: sys.exit(str(error))\n"
    )
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, name]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_hub_id_is_downloaded_once_and_without_second_copies(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    first = resolve(endpoint, "acme/tiny", tmp_path)
    assert first.returncode == 0, first.stderr
    directory = Path(first.stdout.strip())
    wanted = {"config.json", "tokenizer.json", "model.safetensors"}
    assert {path.name for path in directory.iterdir()} == wanted
    assert all((directory / name).read_bytes() == FILES[name] for name in wanted)
    hub.asked.clear()
    assert resolve(endpoint, "acme/tiny", tmp_path).stdout == first.stdout
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "words"), [("acme/gated", "is gated"), ("acme/absent", "the hub has no model acme/absent")]
)
def test_a_refusal_is_one_clear_line(hub: ThreadingHTTPServer, tmp_path: Path, name: str, words: str) -> None:
    refused = resolve(f"http://127.0.0.1:{hub.server_port}", name, tmp_path)
    assert refused.returncode == 1
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    refused = resolve("http://127.0.0.1:9", "acme/tiny", tmp_path)
    assert refused.returncode == 1
    assert "cannot download acme/tiny" in refused.stderr
