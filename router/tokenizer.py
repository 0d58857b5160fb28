"""Text to token ids and back, for one checkpoint."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from itertools import chain
from os.path import commonprefix
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine_core.errors import CheckpointError, RequestError
from router.chat_template import ChatTemplate, load_chat_template
from router.compiled.library import WordFunctions
from router.compiled.words import CompiledWords
from router.detokenizer import ByteTable, Detokenizer, TableDetokenizer, WindowDetokenizer, byte_table
from router.segments import Segments
from router.words import Words

CONTEXT_TOKENS = 8  # of the prompt, for decoders that look back
MARK = "\ue000"


class TextCodec:
    """Encodes prompts, renders chats, makes detokenizers.

    A prompt of messages is encoded so that special-token strings in a message stay plain text: no user can end his
    turn, or speak as the system, by writing `<|im_end|>`.

    Args:
        template: None if the checkpoint has none: chats are refused.
        vocab_size: of the model; ids beyond it are refused.
        inline_chars: longer texts are encoded on `executor`.
    """

    def __init__(
        self,
        tokenizer_json: str,
        template: ChatTemplate | None,
        vocab_size: int,
        inline_chars: int,
        executor: Executor | None,
    ) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
            self._plain = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"tokenizer.json cannot be read: {error}") from error
        for tokenizer in (self._tokenizer, self._plain):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._plain.encode_special_tokens = True
        self._template = template
        self._table: ByteTable | None = byte_table(self._tokenizer)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        ordered = sorted(self._special.values(), key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._special_start = commonprefix(ordered)  # noqa: RUF071  # they are no paths
        self._surrounds = self._tokenizer.num_special_tokens_to_add(is_pair=False) > 0
        self._segments = Segments(added)
        self._words: Words | CompiledWords | None = Words.of(self._tokenizer)
        self._compiled: CompiledWords | None = None
        self._inline_chars = inline_chars
        self._executor = executor
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = vocab_size or max(vocab.values(), default=-1) + 1
        self.max_token_bytes = max((len(token.encode()) for token in vocab), default=1)

    @classmethod
    def load(cls, model_dir: Path, inline_chars: int, executor: Executor | None) -> TextCodec:
        """Read a checkpoint's tokenizer.json, chat template and vocabulary size."""
        tokenizer_file = model_dir / "tokenizer.json"
        if not tokenizer_file.exists():
            raise CheckpointError(f"{tokenizer_file} does not exist")
        vocab_size = 0
        config_file = model_dir / "config.json"
        if config_file.exists():
            vocab_size = int(json.loads(config_file.read_text(encoding="utf-8")).get("vocab_size") or 0)
        text = tokenizer_file.read_text(encoding="utf-8")
        return cls(text, load_chat_template(model_dir), vocab_size, inline_chars, executor)

    def compile(self, functions: WordFunctions) -> None:
        """Take from now on what is compiled, where it fits this tokenizer."""
        if self._words is not None:
            self._compiled = CompiledWords.of(functions, self._tokenizer)
            self._words = self._compiled or self._words

    async def encode_prompt(self, text: str, parse_special: bool) -> list[int]:
        """Ids of a whole prompt, with the tokens the checkpoint puts around one (such as a leading BOS)."""
        if not self._surrounds and (parse_special or self._special_start not in text):
            ids = self._encode_compiled(text)
            if ids is not None:
                return ids
        tokenizer = self._tokenizer if parse_special else self._plain
        return (await self._encode(tokenizer, [text], True))[0]

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[int]:
        """Ids of a chat up to where the answer begins."""
        if self._template is None:
            raise RequestError("this model has no chat template: use /v1/completions", "messages", "no_chat_template")
        if options and self._special_pattern.search(json.dumps(options, ensure_ascii=False)):
            raise RequestError("special tokens are not allowed here", "chat_template_kwargs")
        texts = "\n".join([value for message in messages for value in message.values() if type(value) is str])
        if self._special_start in texts and self._special_pattern.search(texts):
            return await self._encode_marked(messages, options)
        text = self._template.render(messages, options)
        ids = self._encode_compiled(text)
        return await self._encode_segments(text) if ids is None else ids

    def detokenizer(self, prompt: Sequence[int], is_chat: bool) -> Detokenizer:
        """For the answer to `prompt`."""
        if self._table is not None:
            return TableDetokenizer(self._table, is_chat)
        return WindowDetokenizer(self._tokenizer, prompt[-CONTEXT_TOKENS:])

    def token_bytes(self, token_id: int) -> bytes:
        """One token by itself, special ones spelled out."""
        if token_id in self._special:
            return self._special[token_id].encode()
        if self._table is not None:
            return self._table.of((token_id,))
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text.encode()

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a whole prompt, for `echo`."""
        text: str = self._tokenizer.decode(token_ids)
        return text

    def _encode_compiled(self, text: str) -> list[int] | None:
        """Ids of text in which special tokens count, without any around it; None where that is not compiled."""
        if self._compiled is None or len(text) > self._inline_chars:
            return None
        return self._compiled.encode(text)

    async def _encode(self, tokenizer: Tokenizer, texts: list[str], add_special: bool) -> list[list[int]]:
        if sum(map(len, texts)) <= self._inline_chars or self._executor is None:
            return _ids_of(tokenizer, texts, add_special)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, _ids_of, tokenizer, texts, add_special)

    async def _encode_marked(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[int]:
        """As `encode_chat`, where some message contains the string of a special token.

        Each such string is rendered as an unguessable mark, and encoded by itself as plain text.
        """
        assert self._template is not None
        literals: list[str] = []
        nonce = secrets.token_hex(8)

        def mark(match: re.Match[str]) -> str:
            literals.append(match[0])
            return f"{MARK}{nonce}{len(literals) - 1}{MARK}"

        marked = [
            {name: self._special_pattern.sub(mark, value) if type(value) is str else value for name, value in m.items()}
            for m in messages
        ]
        rendered = self._template.render(marked, options)
        ids: list[int] = []
        for index, piece in enumerate(re.split(f"{MARK}{nonce}([0-9]+){MARK}", rendered)):
            if index % 2:
                ids += (await self._encode(self._plain, [literals[int(piece)]], False))[0]
            elif piece:
                ids += await self._encode_segments(piece)
        return ids

    async def _encode_segments(self, text: str) -> list[int]:
        """Ids of text in which special tokens count, without any around it."""
        pieces = self._segments.cut(text)
        found = self._segments.find(pieces)
        new = dict.fromkeys([piece for piece, ids in zip(pieces, found, strict=True) if ids is None])
        encoded = await self._encode_new(list(new)) if new else {}
        all_ids = [encoded[piece] if ids is None else ids for piece, ids in zip(pieces, found, strict=True)]
        return list(chain.from_iterable(all_ids))

    async def _encode_new(self, pieces: list[str]) -> dict[str, list[int]]:
        """Ids of pieces that are not known, which are remembered: word by word where that will do."""
        encoded: dict[str, list[int]] = {}
        others = pieces
        if self._words is not None and sum(map(len, pieces)) <= self._inline_chars:
            others = []
            for piece in pieces:
                ids = self._words.encode(piece)
                if ids is not None:
                    encoded[piece] = ids
                else:
                    others.append(piece)
        if others:
            encoded |= zip(others, await self._encode(self._tokenizer, others, False), strict=True)
        self._segments.remember(encoded)
        return encoded


def _ids_of(tokenizer: Tokenizer, texts: list[str], add_special: bool) -> list[list[int]]:
    return [encoded.ids for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=add_special)]  # no offsets
