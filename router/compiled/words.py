"""Token ids of whole texts, compiled: what `Words` finds by definition, for tokenizers that cut words as most do."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from router.compiled.library import WordFunctions
from router.detokenizer import BYTE_LEVEL_ALPHABET
from router.words import BYTE_LEVEL, BYTE_TO_PRINTABLE, pattern_of, probes

logger = logging.getLogger(__name__)

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = _QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
_MAX_DIGITS = {BYTE_LEVEL: 0, _QWEN: 1, _LLAMA_3: 3}  # see `BatonWords`
_NUM_ASCII = 128


class CompiledWords:
    """Encodes ASCII texts that may hold added tokens anywhere.

    Args:
        max_digits: see `BatonWords`.
        model: of the tokenizer, as its JSON has it.
        added: ids of added tokens, in ASCII.
    """

    def __init__(
        self, functions: WordFunctions, max_digits: int, model: Mapping[str, Any], added: Mapping[str, int]
    ) -> None:
        vocab: Mapping[str, int] = model["vocab"]
        letters = np.array([vocab[BYTE_TO_PRINTABLE[byte]] for byte in range(_NUM_ASCII)], np.int32)
        merges = np.array([(vocab[a], vocab[b], vocab[a + b]) for a, b in model["merges"]], np.int32)
        self._encode = functions.encode
        self._words = functions.make(max_digits, letters.ctypes.data, merges.ctypes.data, len(merges))
        weakref.finalize(self, functions.free, self._words)
        for content in sorted(added, key=len, reverse=True):
            functions.add_token(self._words, content.encode(), added[content])
        if model["ignore_merges"]:
            for token, token_id in vocab.items():
                text = bytes([BYTE_LEVEL_ALPHABET.get(letter, _NUM_ASCII) for letter in token])
                if text.isascii():
                    functions.add_whole(self._words, text, token_id)

    @classmethod
    def of(cls, functions: WordFunctions, tokenizer: Tokenizer) -> CompiledWords | None:
        """None where the tokenizer is of another kind.

        Args:
            tokenizer: one that there are `Words` of.
        """
        max_digits = _MAX_DIGITS.get(pattern_of(tokenizer) or "")
        tokens = tokenizer.get_added_tokens_decoder()
        added = {token.content: token_id for token_id, token in tokens.items() if token.content.isascii()}
        if max_digits is None or any("\0" in content for content in added):
            return None
        try:
            words = cls(functions, max_digits, json.loads(tokenizer.model.__getstate__()), added)
        except KeyError:  # some byte has no token
            return None
        texts = probes(list(added))
        if not all(words.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids for text in texts):
            logger.warning("this tokenizer differs from its kind: its words are looked up in Python")
            return None
        return words

    def encode(self, text: str) -> list[int] | None:
        """Ids of a text; None: the tokenizer must be asked."""
        return self._encode(self._words, text) if text.isascii() else None
