"""Prompts of validated request bodies to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Raw

from engine_core.errors import RequestError
from router.chat_template import SPECIAL_NAMES
from router.openai_types import ChatBody, ChatMessage, CompletionBody, Unserved
from router.sampling import too_long
from router.tokenizer import TextCodec

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
UNSERVED = Unserved(dict.fromkeys(("tool_calls", "function_call", "audio"), (b"[]",)))
_NO_OPTIONS: Mapping[str, Any] = {}
MAX_KWARGS_BYTES = 16 << 10
RESERVED_KWARGS = frozenset({"self", "messages", "tools", "documents", "add_generation_prompt", *SPECIAL_NAMES})


def num_prompts(body: CompletionBody) -> int:
    """How many prompts there are, before looking at them."""
    prompt = body.prompt
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


async def completion_prompts(
    body: CompletionBody, codec: TextCodec, max_len: int, parse_special: bool
) -> list[list[int]]:
    """One list of ids per prompt."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [await _encode(prompt, "prompt", codec, max_len, parse_special)]
    if not prompt:
        raise RequestError("prompt must be a string, token ids, or a list of either, and not empty", "prompt")
    if isinstance(prompt[0], int):
        return [_check_ids(prompt, "prompt", codec, max_len)]
    prompts = []
    for index, item in enumerate(prompt):
        name = f"prompt[{index}]"
        if type(item) is not type(prompt[0]):
            raise RequestError("prompt must not mix strings and token ids", name, "invalid_type")
        if isinstance(item, str):
            prompts.append(await _encode(item, name, codec, max_len, parse_special))
        elif isinstance(item, list):
            prompts.append(_check_ids(item, name, codec, max_len))
    return prompts


async def chat_prompt(body: ChatBody, codec: TextCodec, max_len: int) -> list[int]:
    """Ids of the rendered chat."""
    if not body.messages:
        raise RequestError("messages must not be empty", "messages", "empty_prompt")
    if len(body.messages) >= max_len:
        raise too_long(len(body.messages), max_len, "messages", "at least ")
    options = _NO_OPTIONS if body.chat_template_kwargs is UNSET else _options(body.chat_template_kwargs)
    messages: list[dict[str, str]] = []
    chars = 0
    for message in body.messages:
        role, content = ROLES.get(message.role), message.content
        if role is None or type(content) is not str or UNSERVED.find(message) is not None:
            role, content = _unusual(message, f"messages[{len(messages)}]")
        seen = {"role": role, "content": content}  # what the template sees
        if message.name:
            seen["name"] = message.name
        messages.append(seen)
        chars += len(content)
    _check_chars(chars, "messages", codec, max_len)
    return await codec.encode_chat(messages, options)


def _options(raw: Raw) -> Mapping[str, Any]:
    """Variables for the chat template; small, because they are parsed into any kind of object."""
    if len(bytes(raw)) > MAX_KWARGS_BYTES:
        raise RequestError(f"must not exceed {MAX_KWARGS_BYTES} bytes", "chat_template_kwargs")
    try:
        options: dict[str, Any] = msgspec.json.decode(raw, type=dict[str, Any] | None) or {}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"must be a JSON object: {error}", "chat_template_kwargs", "invalid_type") from None
    if not RESERVED_KWARGS.isdisjoint(options):
        raise RequestError(f"{sorted(RESERVED_KWARGS & set(options))} cannot be set", "chat_template_kwargs")
    return options


def _unusual(message: ChatMessage, where: str) -> tuple[str, str]:
    """Role and content of a message of several parts, or of one that is not served."""
    role = ROLES.get(message.role)
    if role is None:
        raise RequestError(
            f"unknown role {message.role!r}; this server takes {', '.join(ROLES)}", f"{where}.role", "invalid_value"
        )
    name = UNSERVED.find(message)
    if name is not None:
        raise RequestError(f"{name} is not supported", f"{where}.{name}", "unsupported_value")
    content = message.content
    if content is None:
        raise RequestError("content is missing", f"{where}.content", "missing_required_parameter")
    if isinstance(content, str):
        return role, content
    texts = []
    for index, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise RequestError(
                "only content parts of type text, with a text, are supported",
                f"{where}.content[{index}]",
                "unsupported_value",
            )
        texts.append(part.text)
    return role, "\n".join(texts)


async def _encode(text: str, name: str, codec: TextCodec, max_len: int, parse_special: bool) -> list[int]:
    if not text:
        raise RequestError("the prompt is empty", name, "empty_prompt")
    _check_chars(len(text), name, codec, max_len)
    return await codec.encode_prompt(text, parse_special)


def _check_chars(chars: int, name: str, codec: TextCodec, max_len: int) -> None:
    """Refuse what is too long however it is tokenized, without tokenizing megabytes.

    A token stands for at most `max_token_bytes` bytes; 4 allows for normalizers that shorten the text first.
    """
    at_least = chars // (4 * codec.max_token_bytes)
    if at_least >= max_len:
        raise too_long(at_least, max_len, name, "at least ")


def _check_ids(ids: Sequence[Any], name: str, codec: TextCodec, max_len: int) -> list[int]:
    vocab_size = codec.vocab_size
    if not ids:
        raise RequestError("the prompt is empty", name, "empty_prompt")
    if len(ids) >= max_len:
        raise too_long(len(ids), max_len, name)
    for index, token_id in enumerate(ids):
        if type(token_id) is not int:
            raise RequestError("prompt must not mix strings and token ids", f"{name}[{index}]", "invalid_type")
        if token_id >= vocab_size:
            raise RequestError(f"token ids must be below {vocab_size}, not {token_id}", f"{name}[{index}]")
    return list(ids)
