"""Token ids of text that ends and begins at special tokens: segments that were encoded before need not be again.

A tokenizer cuts a text at its added tokens first, and what it does between two of them depends on nothing else. So a
chat is encoded segment by segment, each an added token and the text up to the next one: of a conversation that comes
back with one more turn, or of a system prompt that everyone sends, only what is new is encoded.
"""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import AddedToken

MAX_BYTES = 64 << 20  # of segments and their ids that are remembered
_OVERHEAD_BYTES = 200  # of a segment besides its text and ids


class Segments:
    """Cuts texts, and remembers the ids of pieces, the least recently used of which are forgotten.

    Args:
        added_tokens: of the tokenizer, by id.
        max_bytes: what is remembered may take.
    """

    def __init__(self, added_tokens: Mapping[int, AddedToken], max_bytes: int = MAX_BYTES) -> None:
        self._pattern = _pattern(added_tokens)
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._ids: OrderedDict[str, array[int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ids)

    def cut(self, text: str) -> list[str]:
        """Pieces that can be encoded by themselves: their ids, one after the other, are those of the text."""
        if self._pattern is None:
            return [text]
        before, *parts = self._pattern.split(text)
        pieces = [token + after for token, after in zip(parts[::2], parts[1::2], strict=True)]
        return [before, *pieces] if before or not pieces else pieces

    def find(self, pieces: Iterable[str]) -> list[list[int] | None]:
        """Ids of each piece; None where they are not known."""
        found: list[list[int] | None] = []
        for piece in pieces:
            ids = self._ids.get(piece)
            if ids is None:
                found.append(None)
            else:
                self._ids.move_to_end(piece)
                found.append(ids.tolist())  # half as long as to iterate over them
        return found

    def remember(self, encoded: Mapping[str, Sequence[int]]) -> None:
        """Ids of pieces that were not known."""
        for piece, ids in encoded.items():
            if piece not in self._ids:
                self._ids[piece] = kept = array("i", ids)
                self._num_bytes += _size(piece, kept)
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= _size(*self._ids.popitem(last=False))


def _size(piece: str, ids: array[int]) -> int:
    return _OVERHEAD_BYTES + 4 * len(piece) + ids.itemsize * len(ids)


def _pattern(added_tokens: Mapping[int, AddedToken]) -> re.Pattern[str] | None:
    """Of the tokens at which texts are cut: the longest that begins first, as tokenizers have it.

    None where cutting there could change ids: some token looks at what surrounds it.
    """
    first = [token for token in added_tokens.values() if not token.normalized]  # cut at before anything else is done
    if not first or any(token.lstrip or token.rstrip or token.single_word for token in first):
        return None
    contents = sorted((token.content for token in first), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, contents))})")
