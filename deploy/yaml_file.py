"""YAML files of clusters, with the line in which each thing stands: what is wrong is told as `file:line: text`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from engine_core.errors import ConfigError

Place = tuple[str | int, ...]


class Problem(msgspec.Struct, frozen=True):
    """Something wrong. `line` counts from 1."""

    line: int
    text: str


class Document:
    """One document of a file.

    Attributes:
        content: as plain lists and dicts.
    """

    def __init__(self, root: yaml.Node, content: dict[str, Any]) -> None:
        self._root = root
        self.content = content

    def line(self, place: Place) -> int:
        """Where something stands; where that does not exist, the nearest thing above it."""
        node, line = self._root, self._root.start_mark.line + 1
        for step in place:
            found = _child(node, step)
            if found is None:
                return line
            node, line = found
        return line

    def problem(self, place: Place, text: str) -> Problem:
        """What is wrong there."""
        return Problem(self.line(place), text)


def read(path: Path) -> list[Document]:
    """The documents of a file, empty ones left out.

    Raises:
        ConfigError: it is not there, not YAML, or a document is no mapping.
    """
    try:
        text = path.read_text()
        pairs = zip(yaml.compose_all(text, yaml.SafeLoader), yaml.safe_load_all(text), strict=True)
        documents = [Document(root, content) for root, content in pairs if content is not None]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: {error.problem}") from None
    for document in documents:
        if not isinstance(document.content, dict):
            raise ConfigError(f"{path}:{document.line(())}: it must be a mapping")
    return documents


def describe(path: Path, problems: Sequence[Problem]) -> str:
    """`file:line: text`, one per line."""
    return "\n".join(f"{path}:{problem.line}: {problem.text}" for problem in problems)


def _child(node: Any, step: str | int) -> tuple[Any, int] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(step):
                return value, key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], node.value[step].start_mark.line + 1
    return None
