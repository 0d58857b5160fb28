"""From defaults, a TOML file and flags to one instance of nested frozen dataclasses, and back to plain dicts.

Works for any composition of frozen dataclasses (`engine_core.config_fields` lists the leaf types). Defaults live in
the classes alone; the file overrides them, flags override the file. In names, hyphens and underscores are the same.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, TypeVar

from engine_core.config_fields import (
    Fields,
    Leaf,
    Mismatch,
    collect,
    default_of,
    describe,
    from_text,
    from_value,
    short_name,
    to_text,
    to_value,
)
from engine_core.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FieldHelp:
    """One configuration field, for --help and the documentation.

    Attributes:
        name: dotted; the flag is `--name`.
        type: `int`, `fast|strict`, `int,...`.
        default: as a flag would say it; None where a value is required.
        comment: the comment behind the field in the source.
    """

    name: str
    type: str
    default: str | None
    comment: str


def load(
    cls: type[T],
    argv: Sequence[str],
    toml_path: Path | str | None = None,
    aliases: Mapping[str, str] | None = None,
) -> T:
    """Read a configuration: defaults < TOML file < flags.

    Flags: `--cache.page_size 64`, `--cache.page-size=64`; of a bool also `--prefix_cache` and `--no-prefix_cache`.
    Of a flag given twice the last counts. A value that starts with `--` needs the form with `=`.

    Args:
        cls: frozen dataclass of leaves and further frozen dataclasses.
        argv: flags only, without the program's name.
        toml_path: file to read; `--config FILE` among the flags takes its place.
        aliases: further names of flags: `{"model": "model.path"}`. A key that ends in a dot, or is empty, stands for
            a prefix: `{"": "engine."}` makes `--cache.page_size` another name of `--engine.cache.page_size`.

    Raises:
        ConfigError: names the field and what it may be; or what the class itself refuses.
    """
    fields = collect(cls)
    flags, config_path = _read_flags(argv, fields, aliases or {})
    toml_path = config_path or toml_path
    values = _read_toml(Path(toml_path), fields) if toml_path else {}
    return _build(cls, "", None, {**values, **flags})


def from_dict(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """Inverse of `to_dict`; what the mapping leaves out keeps its default.

    Raises:
        ConfigError: names the field and what it may be.
    """
    values: dict[str, Any] = {}
    _flatten(mapping, "", collect(cls), "", values)
    return _build(cls, "", None, values)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dicts of all fields, fit for JSON; None stays None."""
    plain = {}
    for field in dataclasses.fields(config):
        if field.init:
            value = getattr(config, field.name)
            plain[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else to_value(value)
    return plain


def field_help(cls: type[Any]) -> list[FieldHelp]:
    """Describe every leaf field, in the order of declaration."""
    return [
        FieldHelp(
            name=leaf.name,
            type=short_name(leaf.kind),
            default=None if leaf.default is MISSING else to_text(leaf.default),
            comment=leaf.comment,
        )
        for leaf in collect(cls).leaves.values()
    ]


def _read_flags(argv: Sequence[str], fields: Fields, aliases: Mapping[str, str]) -> tuple[dict[str, Any], str | None]:
    """Values by dotted name, and the file that `--config` names."""
    values: dict[str, Any] = {}
    config_path = None
    rest = list(reversed(argv))
    while rest:
        flag, equals, text = rest.pop().partition("=")
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(f"unexpected argument {flag + equals + text!r}; flags look like --name VALUE")
        leaf, negated = _find_flag(flag, fields, aliases)
        if negated:
            if equals:
                raise ConfigError(f"{flag} takes no value, but was given {text!r}")
            values[leaf.name] = False
            continue
        if not equals and rest and not rest[-1].startswith("--"):
            text = rest.pop()
        elif not equals and leaf.kind is bool:
            text = "true"
        elif not equals:
            raise ConfigError(f"{flag} needs a value: {leaf.name} must be {describe(leaf.kind)}")
        try:
            value = from_text(leaf.kind, text)
        except Mismatch:
            raise ConfigError(f"{leaf.name} must be {describe(leaf.kind)}, not {text!r}") from None
        if leaf is _CONFIG:
            config_path = text
        else:
            values[leaf.name] = value
    return values, config_path


_CONFIG = Leaf("config", Path, None, "")


def _find_flag(flag: str, fields: Fields, aliases: Mapping[str, str]) -> tuple[Leaf, bool]:
    """The field a flag sets, and whether the flag says no."""
    name = flag[2:].replace("-", "_")
    if leaf := _resolve(name, fields, aliases):
        return leaf, False
    if name.startswith("no_") and (leaf := _resolve(name[3:], fields, aliases)) and leaf.kind is bool:
        return leaf, True
    if name == _CONFIG.name:
        return _CONFIG, False
    names = [*fields.leaves, *(alias for alias in aliases if alias and not alias.endswith("."))]
    for short, long in aliases.items():
        if not short or short.endswith("."):
            names += [short + full.removeprefix(long) for full in fields.leaves if full.startswith(long)]
    if name in fields.sections:
        names = [full for full in names if full.startswith(f"{name}.")]
        raise ConfigError(f"{flag} is a section; its flags are {', '.join('--' + full for full in names)}")
    raise ConfigError(f"unknown flag {flag}{_closest(name, names, '--')}")


def _resolve(name: str, fields: Fields, aliases: Mapping[str, str]) -> Leaf | None:
    if name in fields.leaves:
        return fields.leaves[name]
    for short, long in aliases.items():
        short = short.replace("-", "_")
        if name == short:
            return fields.leaves[long]
        if (not short or short.endswith(".")) and name.startswith(short):
            leaf = fields.leaves.get(long + name.removeprefix(short))
            if leaf is not None:
                return leaf
    return None


def _read_toml(path: Path, fields: Fields) -> dict[str, Any]:
    try:
        mapping = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: nesting too deep, or no home directory
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"configuration file {path}: {reason}") from error
    values: dict[str, Any] = {}
    _flatten(mapping, "", fields, f"{path}: ", values)
    return values


def _flatten(mapping: Mapping[str, Any], prefix: str, fields: Fields, origin: str, values: dict[str, Any]) -> None:
    """Check `mapping` and put its leaves into `values` by dotted name."""
    for key, value in mapping.items():
        name = prefix + str(key).replace("-", "_")
        if name in fields.sections:
            if not isinstance(value, Mapping):
                inside = ", ".join(_members(name + ".", fields))
                raise ConfigError(f"{origin}{name} is a section with the fields {inside}, not {value!r}")
            _flatten(value, name + ".", fields, origin, values)
        elif name in fields.leaves:
            if name in values:
                raise ConfigError(f"{origin}{name} is given twice")
            kind = fields.leaves[name].kind
            try:
                values[name] = from_value(kind, value)
            except Mismatch:
                raise ConfigError(f"{origin}{name} must be {describe(kind)}, not {value!r}") from None
        else:
            allowed = _members(prefix, fields)
            raise ConfigError(f"{origin}unknown field {name}{_closest(name, allowed, '')}")


def _members(prefix: str, fields: Fields) -> list[str]:
    """Fields and sections directly below a section."""
    names = [*fields.leaves, *fields.sections]
    return [name for name in names if name.startswith(prefix) and "." not in name.removeprefix(prefix)]


def _closest(name: str, allowed: Iterable[str], dashes: str) -> str:
    allowed = list(dict.fromkeys(allowed))
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.75)
    if close:
        return f"; did you mean {dashes}{close[0]}?"
    return f"; known are {', '.join(dashes + full for full in allowed)}"


def _build(cls: type[T], prefix: str, base: T | None, values: Mapping[str, Any]) -> T:
    """An instance with `values` by dotted name, over `base` or else over the class's own defaults."""
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if not field.init:
            continue
        name = prefix + field.name
        default = default_of(field) if base is None else getattr(base, field.name)
        below = any(given.startswith(name + ".") for given in values)
        if name in values:
            arguments[field.name] = values[name]
        elif below and default is not MISSING:
            arguments[field.name] = _build(type(default), name + ".", default, values)
        elif default is MISSING:
            arguments[field.name] = _build_required(cls, field, name, values)
    return cls(**arguments) if base is None else dataclasses.replace(base, **arguments)  # type: ignore[type-var]


def _build_required(cls: type[Any], field: dataclasses.Field[Any], name: str, values: Mapping[str, Any]) -> Any:
    kind = collect(cls).sections.get(field.name)
    if kind is None:
        raise ConfigError(f"{name} is required")
    return _build(kind, name + ".", None, values)
