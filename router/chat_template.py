"""Messages to prompt text, through the checkpoint's own Jinja template, with what templates expect of transformers.

Templates come with checkpoints and are code: they run in Jinja's immutable sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, missing

from engine_core.errors import CheckpointError, RequestError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_ALWAYS = {"tools": None, "documents": None, "add_generation_prompt": True}
_DICT_ATTRIBUTES = frozenset(dir(dict))
_STR_METHODS = frozenset(name for name in dir(str) if name[0] != "_") - {"format", "format_map"}  # Jinja wraps those
_PUBLIC = frozenset({LoopContext, Namespace})  # nothing of theirs is unsafe but names that begin so


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja text.
        special_tokens: `bos_token` and the like, for the template's use.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from error
        self._fixed = {**self._template.globals, **special_tokens}
        self._template.globals = {}  # so that no context need be told of them apart

    def render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """Prompt text up to where the assistant's answer begins.

        Raises:
            RequestError: the template refuses these messages.
        """
        seen = {**self._fixed, **options, "messages": messages, **_ALWAYS}
        try:  # what Template.render does, in half the time
            return "".join(self._template.root_render_func(self._template.new_context(seen, shared=True)))
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}", "messages") from error


def load_chat_template(model_dir: Path) -> ChatTemplate | None:
    """The template of a checkpoint: chat_template.jinja, else tokenizer_config.json; None if it has neither."""
    settings: dict[str, Any] = {}
    settings_file = model_dir / "tokenizer_config.json"
    try:
        if settings_file.exists():
            settings = json.loads(settings_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{settings_file} is not JSON: {error}") from error
    template_file = model_dir / "chat_template.jinja"
    source = template_file.read_text(encoding="utf-8") if template_file.exists() else settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        by_name = {entry["name"]: entry["template"] for entry in source}
        source = by_name.get("default") or next(iter(by_name.values()), None)
    if not source:
        return None
    return ChatTemplate(source, _special_tokens(settings))


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in SPECIAL_NAMES:
        value = settings.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time, as transformers has it


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter this does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Environment(ImmutableSandboxedEnvironment):
    def getattr(self, obj: Any, attribute: str) -> Any:
        """As Jinja has it: attributes before items. What templates mostly want, and may have, is found sooner here."""
        kind = type(obj)
        if kind is dict and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if (kind is str and attribute in _STR_METHODS) or (kind in _PUBLIC and attribute[:1] != "_"):
            value = getattr(obj, attribute, missing)
            if value is not missing:
                return value
        return super().getattr(obj, attribute)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only a block."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)
