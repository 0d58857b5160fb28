"""Token ids to text, one step at a time.

Byte-level BPE (Qwen, Llama 3, Mistral Nemo) and SentencePiece with byte fallback (Mistral, Llama 2) become a table
from id to bytes, so a token costs a lookup and an incremental UTF-8 decode. Any other decoder goes through the
tokenizer itself over a short window.
"""

from __future__ import annotations

import json
import re
from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Detokenizer(Protocol):
    """Text of one stream. Concatenated, the pieces equal the text of all ids decoded at once."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text that the new tokens complete; bytes of an unfinished character wait."""
        ...

    def flush(self) -> str:
        """What waits: U+FFFD in place of an unfinished character."""
        ...


class ByteTable:
    """Bytes of every token.

    Args:
        token_bytes: by id; empty for special tokens, which are not part of the text.
        strip_first: the decoder removes one space at the start of a text.
    """

    def __init__(self, token_bytes: list[bytes], strip_first: bool) -> None:
        self.token_bytes = token_bytes
        self.strip_first = strip_first

    def of(self, token_ids: Sequence[int]) -> bytes:
        """Bytes of some tokens; unknown ids have none."""
        table = self.token_bytes
        try:
            return b"".join([table[token_id] for token_id in token_ids])
        except IndexError:
            return b"".join([table[token_id] for token_id in token_ids if token_id < len(table)])


class TableDetokenizer:
    """Detokenizer over a `ByteTable`."""

    __slots__ = ("_first", "_rest", "_table")

    def __init__(self, table: ByteTable, at_start: bool) -> None:
        self._table = table
        self._rest = b""  # of an unfinished character
        self._first = at_start and table.strip_first

    def feed(self, token_ids: Sequence[int]) -> str:
        """See Detokenizer."""
        read = self._rest + self._table.of(token_ids)
        text, used = utf_8_decode(read, "replace", False)
        self._rest = read[used:]
        if self._first and text:
            self._first = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """See Detokenizer."""
        rest, self._rest = self._rest, b""
        return rest.decode(errors="replace")


class WindowDetokenizer:
    """Detokenizer for decoders that no table describes: decodes from the last clean cut.

    Args:
        context: last tokens of the prompt; decoders treat the start of a text in their own way.
    """

    __slots__ = ("_ids", "_read", "_start", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)
        self._start = 0
        self._read = len(self._ids)

    def feed(self, token_ids: Sequence[int]) -> str:
        """See Detokenizer."""
        self._ids += token_ids
        known = self._tokenizer.decode(self._ids[self._start : self._read])
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith("\ufffd") or len(text) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return str(text[len(known) :])

    def flush(self) -> str:
        """See Detokenizer."""
        known = self._tokenizer.decode(self._ids[self._start : self._read])
        text = self._tokenizer.decode(self._ids[self._start :])
        self._start = self._read = len(self._ids)
        return str(text[len(known) :])


def byte_table(tokenizer: Tokenizer) -> ByteTable | None:
    """The table of a tokenizer, or None if its decoder is of another kind."""
    spec = json.loads(tokenizer.to_str())
    decoder = spec.get("decoder") or {}
    steps = decoder.get("decoders") or [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        to_bytes, strip_first = _byte_level, False
    elif kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        if steps[0].get("pattern") != {"String": "▁"} or steps[0].get("content") != " ":
            return None
        to_bytes, strip_first = _sentencepiece, "Strip" in kinds
    else:
        return None
    special = {token["id"] for token in spec.get("added_tokens", ()) if token["special"]}
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        if token_id not in special:
            table[token_id] = to_bytes(token)
    return ByteTable(table, strip_first)


def _alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


BYTE_LEVEL_ALPHABET = _alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([BYTE_LEVEL_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()
