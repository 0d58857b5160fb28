"""What can be configured: the leaf fields of nested frozen dataclasses, by dotted name, and values of their types.

Supported leaf types: bool, int, float, str, Path, Enum, Literal, tuples of these, and unions of these with None.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import math
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class Leaf:
    """A field that is not itself a section.

    Attributes:
        name: dotted, from the root class: `cache.page_size`.
        kind: its type, annotations resolved.
        default: `dataclasses.MISSING` where a value must be given.
        comment: the source comment behind the field; empty where there is none.
    """

    name: str
    kind: Any
    default: Any
    comment: str


@dataclass(frozen=True, slots=True)
class Fields:
    """All of a configuration class.

    Attributes:
        leaves: dotted name -> leaf, in the order of declaration.
        sections: dotted name -> the dataclass of that section; the root is not among them.
    """

    leaves: dict[str, Leaf]
    sections: dict[str, type[Any]]


class Mismatch(Exception):
    """A value is not of the type asked for; the caller names the field."""


def collect(cls: type[Any]) -> Fields:
    """List the fields of a dataclass and of the dataclasses in it.

    Raises:
        TypeError: a field has a type that this module does not support (our own bug).
    """
    fields = Fields({}, {})
    _collect(cls, "", None, fields)
    return fields


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default, `MISSING` where it has none."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _collect(cls: Any, prefix: str, base: object, fields: Fields) -> None:
    hints = get_type_hints(cls)
    comments = _comments(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        name, kind = prefix + field.name, hints[field.name]
        default = default_of(field) if base is None else getattr(base, field.name)
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            fields.sections[name] = kind
            _collect(kind, name + ".", None if default is MISSING else default, fields)
        else:
            describe(kind)
            fields.leaves[name] = Leaf(name, kind, default, comments.get(field.name, ""))


@functools.cache
def _comments(cls: type[Any]) -> dict[str, str]:
    """Comments on the lines of each annotated field, joined by spaces."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except (OSError, TypeError):
            continue  # a class without source, such as `object`
        lines = {
            token.start[0]: token.string.lstrip("#").strip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        declaration = ast.parse(source).body[0]
        assert isinstance(declaration, ast.ClassDef)
        for node in declaration.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                found[node.target.id] = " ".join(lines[line] for line in span if line in lines)
    return found


def choices(kind: Any) -> list[Any] | None:
    """The values of an Enum or Literal, None for other types."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.value for member in kind]
    return list(get_args(kind)) if get_origin(kind) is Literal else None


def describe(kind: Any) -> str:
    """A type in words, for "must be ..."."""
    if (allowed := choices(kind)) is not None:
        return "one of " + ", ".join(map(str, allowed))
    if kind in _NOUNS:
        return _NOUNS[kind]
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(describe(arm) for arm in get_args(kind))
    if get_origin(kind) is tuple:
        arms = get_args(kind)
        if arms[1:] == (...,):
            return f"a list of which each is {describe(arms[0])}"
        return "a list of " + ", then ".join(describe(arm) for arm in arms)
    raise TypeError(f"{kind} is no type of a configuration field")


def short_name(kind: Any) -> str:
    """A type in short, for --help: `int`, `fast|strict`, `int,...`."""
    if (allowed := choices(kind)) is not None:
        return "|".join(map(str, allowed))
    if get_origin(kind) in (Union, UnionType):
        return "|".join(short_name(arm) for arm in get_args(kind))
    if get_origin(kind) is tuple:
        return ",".join("..." if arm is ... else short_name(arm) for arm in get_args(kind))
    return "none" if kind is NoneType else str(kind.__name__).lower()


def from_value(kind: Any, value: object) -> Any:
    """Check a value as TOML or JSON gives it, and make it one of `kind`.

    Raises:
        Mismatch: it is none.
    """
    if (allowed := choices(kind)) is not None:
        for choice in allowed:
            if (
                choice == value
                and isinstance(value, type(choice))
                and isinstance(value, bool) is isinstance(choice, bool)
            ):
                return kind(choice) if isinstance(kind, type) else choice
        raise Mismatch
    if get_origin(kind) in (Union, UnionType):
        return _first(get_args(kind), lambda arm: from_value(arm, value))
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise Mismatch
        return tuple(from_value(arm, item) for arm, item in _pairs(kind, value))
    return _scalar(kind, value)


def from_text(kind: Any, text: str) -> Any:
    """Read a flag's value: `true`, `1_000`, `0.5`, `strict`, `1,2,3`, `none`.

    Raises:
        Mismatch: it is no value of `kind`.
    """
    if (allowed := choices(kind)) is not None:
        return from_value(kind, next((choice for choice in allowed if str(choice) == text), MISSING))
    if get_origin(kind) in (Union, UnionType):
        arms = sorted(get_args(kind), key=lambda arm: (arm is not NoneType, arm is str))  # str takes anything: last
        return _first(arms, lambda arm: from_text(arm, text))
    if get_origin(kind) is tuple:
        items = [item.strip() for item in text.split(",")] if text.strip() else []
        return tuple(from_text(arm, item) for arm, item in _pairs(kind, items))
    if kind in _READERS:
        try:
            return _scalar(kind, _READERS[kind](text))
        except (ValueError, KeyError):
            raise Mismatch from None
    return _scalar(kind, text)


def to_value(value: Any) -> Any:
    """The inverse of `from_value`: only what JSON and TOML know (and None)."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    return [to_value(item) for item in value] if isinstance(value, tuple) else value


def to_text(value: Any) -> str:
    """The inverse of `from_text`."""
    if isinstance(value, tuple):
        return ",".join(map(to_text, value))
    value = to_value(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _scalar(kind: Any, value: object) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise Mismatch from None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Mismatch
    if isinstance(value, float) and math.isnan(value):
        raise Mismatch
    return value


def _first(arms: Any, read: Callable[[Any], Any]) -> Any:
    for arm in arms:
        try:
            return read(arm)
        except Mismatch:
            continue
    raise Mismatch


def _pairs(kind: Any, items: Any) -> Iterator[tuple[Any, Any]]:
    arms = get_args(kind)
    if arms[1:] == (...,):
        return ((arms[0], item) for item in items)
    if len(arms) != len(items):
        raise Mismatch
    return zip(arms, items, strict=True)


_NOUNS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    Path: "a path",
    NoneType: "none",
}
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_READERS: dict[Any, Callable[[str], object]] = {
    bool: lambda text: _TRUTH[text.lower()],
    int: int,
    float: float,
    NoneType: lambda text: {"none": None}[text.lower()],
}
