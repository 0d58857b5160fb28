"""Which directory a model name means, and whether it can be served at all: cheap checks, before anything starts."""

from __future__ import annotations

import contextlib
import importlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deploy.config import DEMO
from engine_core.errors import CheckpointError
from engine_core.models.registry import load_spec, read_json
from engine_core.models.spec import ModelSpec

DEMO_DIR = Path(__file__).parent / "demo_model"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
SECOND_COPIES = ("consolidated*", "original/*", "onnx/*")  # of the weights, in other formats
MAX_HEADER_BYTES = 100 << 20


class HubUnreachable(CheckpointError):
    """The Hugging Face hub does not answer, or not now."""


def resolve(name: str, revision: str, say: Callable[[str], None]) -> Path:
    """The directory of a model: the embedded one, a directory, or a download from the Hugging Face hub.

    Raises:
        CheckpointError: it is none of these, or the hub cannot be reached or refuses.
    """
    path = _on_disk(name)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; --model wants the directory that holds config.json and safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name!r} is neither a directory nor a hub id such as Qwen/Qwen3-0.6B")
    return _download(name, revision, say)


def _on_disk(name: str) -> Path:
    """Where a model is that needs no download."""
    return DEMO_DIR if name == DEMO else Path(name).expanduser()


def on_node(model_dir: str, name: str, revision: str, say: Callable[[str], None]) -> Path:
    """The model's directory on this machine: the one that was resolved where Baton started, or looked up again here."""
    path = Path(model_dir)
    return path if path.is_dir() else resolve(name, revision, say)


def _download(name: str, revision: str, say: Callable[[str], None]) -> Path:
    say(f"Looking up {name} on the Hugging Face hub ...")
    hub = importlib.import_module("huggingface_hub")
    with _hub_errors(name, revision):
        directory = hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(HUB_FILES), ignore_patterns=list(SECOND_COPIES)
        )
        return Path(directory)


def config_directory(name: str) -> Path | None:
    """Where the config.json of a model is, which may be one of the hub; None where the hub cannot be asked.

    Raises:
        CheckpointError: there is none.
    """
    directory = _on_disk(name)
    if directory.is_dir():
        return directory
    try:
        return fetch_config(name).parent
    except HubUnreachable:
        return None


def fetch_config(name: str) -> Path:
    """The config.json of a model of the hub, and nothing else of it.

    Raises:
        CheckpointError: no hub id, or the hub does not give it out.
    """
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name!r} is neither a directory nor a hub id such as Qwen/Qwen3-0.6B")
    hub = importlib.import_module("huggingface_hub")
    with _hub_errors(name, ""):
        return Path(hub.hf_hub_download(name, "config.json"))


@contextlib.contextmanager
def _hub_errors(name: str, revision: str) -> Iterator[None]:
    """What the hub's client raises, as one line that says what to do."""
    errors = importlib.import_module("huggingface_hub.errors")
    httpx = importlib.import_module("httpx")
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(f"{name} is gated: accept its terms on the hub and log in with `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(f"the hub has no model {name}{at} (or it is private and you are not logged in)") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        raise HubUnreachable(f"cannot download {name}: {_first_line(error)}") from None


def validate(model_dir: Path) -> ModelSpec:
    """Refuse what no worker could load: wrong architecture, missing, truncated or malformed files.

    Raises:
        CheckpointError: one line that names the file.
    """
    spec = load_spec(model_dir)
    read_json(model_dir / "tokenizer.json")
    if (model_dir / SINGLE).is_file():
        check_safetensors(model_dir / SINGLE)
        return spec
    if not (model_dir / INDEX).is_file():
        raise CheckpointError(f"{model_dir} holds neither {SINGLE} nor {INDEX}")
    weight_map = read_json(model_dir / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{model_dir / INDEX} has no weight_map")
    for file in sorted(set(weight_map.values())):
        present = check_safetensors(model_dir / file)
        missing = sorted(name for name, where in weight_map.items() if where == file and name not in present)
        if missing:
            raise CheckpointError(f"{model_dir / file} lacks {missing[0]}, which {INDEX} says it holds")
    return spec


def check_safetensors(path: Path) -> set[str]:
    """Tensor names of a file whose header is sound and whose bytes are all there."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size + 1
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is truncated or not a safetensors file ({size} bytes)")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not an object")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    expected = 8 + length + max((_end(path, name, entry) for name, entry in tensors.items()), default=0)
    if size != expected:
        word = "truncated" if size < expected else "malformed"
        raise CheckpointError(f"{path} is {word}: {size} bytes, its header says {expected}")
    return set(tensors)


def _end(path: Path, name: str, entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(isinstance(offset, int) for offset in offsets):
        raise CheckpointError(f"{path} is malformed: tensor {name} has no data_offsets")
    return int(offsets[1])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
