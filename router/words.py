"""Token ids of ASCII text, word by word: words that were seen before need not be encoded again.

A byte-level tokenizer (Qwen, Llama 3, Mistral Nemo) cuts a text into words by a regular expression and encodes each by
itself. The library takes most of its time for the cutting. Of ASCII text Python does the same in a fifth of it: there
the expression needs no Unicode tables, and normalization changes nothing.
"""

from __future__ import annotations

import json
import logging
import random
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC

from router.detokenizer import BYTE_LEVEL_ALPHABET

logger = logging.getLogger(__name__)

MAX_WORDS = 1 << 16  # that are remembered
MAX_WORD_CHARS = 64  # of one that is
_PROBES = 200
BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # where use_regex is set
_NONE = "\u0100"  # of ASCII
_ASCII_OF = {"L": "a-zA-Z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", **dict.fromkeys(("Lt", "Lm", "Lo", "M"), _NONE)}
_PROPERTY = re.compile(r"\\p\{(\w+)\}")
_CLASS = re.compile(r"\[(?:\\.|[^\\\]])*\]")
BYTE_TO_PRINTABLE = {byte: printable for printable, byte in BYTE_LEVEL_ALPHABET.items()}


class Words:
    """Encodes texts that hold no added token but, perhaps, at their start.

    Args:
        pattern: what is a word, in ASCII text.
        model: encodes one.
        added: ids of added tokens.
    """

    def __init__(self, pattern: str, model: BPE, added: Mapping[str, int]) -> None:
        tokens = [re.escape(content) for content in sorted(added, key=len, reverse=True)]
        self._find = re.compile("|".join([*tokens, pattern]), re.ASCII).findall
        self._ids = _Ids(model, added)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Words | None:
        """None where the tokenizer is of another kind."""
        pattern = pattern_of(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        if pattern is None or not all(map(_is_plain, added.values())):
            return None
        ids = {token.content: token_id for token_id, token in added.items()}
        try:
            with warnings.catch_warnings(action="error"):  # about what a later Python will read differently
                words = cls(_of_ascii(pattern), tokenizer.model, ids)
        except (re.error, FutureWarning):
            return None
        if not all(words.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids for text in probes([])):
            logger.warning("this tokenizer cuts words in an unknown way: no word of a new message will be remembered")
            return None
        return words

    def encode(self, text: str) -> list[int] | None:
        """Ids of a text; None: the tokenizer must be asked."""
        if not text.isascii():
            return None
        words = self._find(text)
        if sum(map(len, words)) != len(text):
            return None
        return list(chain.from_iterable(map(self._ids.__getitem__, words)))


class _Ids(dict[str, tuple[int, ...]]):
    """By word."""

    def __init__(self, model: BPE, added: Mapping[str, int]) -> None:
        self._tokenize = model.tokenize
        self._added = {content: (token_id,) for content, token_id in added.items()}
        super().__init__(self._added)

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple([token.id for token in self._tokenize(word.translate(BYTE_TO_PRINTABLE))])
        if len(word) <= MAX_WORD_CHARS:
            if len(self) >= MAX_WORDS:
                self.clear()
                self.update(self._added)
            self[word] = ids
        return ids


def pattern_of(tokenizer: Tokenizer) -> str | None:
    """What a word is to this tokenizer; None where it is of another kind."""
    model, normalizer = tokenizer.model, tokenizer.normalizer
    if not isinstance(model, BPE) or model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if tokenizer.pre_tokenizer is None or not isinstance(normalizer, NFC | None):
        return None
    spec = json.loads(tokenizer.pre_tokenizer.__getstate__())
    match spec.get("pretokenizers", [spec]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return BYTE_LEVEL
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return str(pattern)
    return None


def _of_ascii(pattern: str) -> str:
    """With `\\p{...}` spelled out; of those that are not known `re` will say so."""

    def spell(found: re.Match[str]) -> str:
        return _ASCII_OF.get(found[1], found[0])

    in_classes = _CLASS.sub(lambda found: _PROPERTY.sub(spell, found[0]), pattern)
    return _PROPERTY.sub(lambda found: f"[{spell(found)}]", in_classes)


def _is_plain(token: AddedToken) -> bool:
    """Whether texts are cut at it before anything else is done, and nothing around it matters."""
    return not (token.normalized or token.lstrip or token.rstrip or token.single_word)


def probes(added: Sequence[str]) -> list[str]:
    """Texts of all ASCII characters, and of added tokens, in many orders."""
    rng = random.Random(0)
    ascii_characters = [chr(code) for code in range(128)]
    common = ["the", "Fox", "I'M", "don't", "we've", "they're", "'ll", "42", "1234567", "...", "(", ")", "'", "_"]
    common += [" ", "  ", "\n", "\r\n", "\t"]
    pieces = [*ascii_characters, *8 * common, *added]
    return ["".join(rng.choices(pieces, k=40)) for _ in range(_PROBES)]
