"""Compiles what placement computes and how texts are tokenized, keeps the library, and says how it is called."""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine_core.compiled_library import Sources, build_library, load_library

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_SOURCES = Sources(
    name="baton_router",
    purpose="placement and tokenizing",
    otherwise="NumPy and Python do it, in twice the time",
    files=(_HERE / "hashing.cc", _HERE / "matching.cc", _HERE / "ranking.cc", _HERE / "words.cc"),
    headers=(),
    flags=(
        "-ffp-contract=off",  # so that both find the same numbers
        *(("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()),  # Python's functions, as elsewhere
    ),
)

Hash = Callable[[list[int], int, int, bytes, int], int]


@dataclass(frozen=True, slots=True)
class WordFunctions:
    """Of an encoder of texts. See words.cc.

    Attributes:
        make: most digits in a word, ids of letters, merges, how many -> an encoder.
        free: it.
        add_token, add_whole: encoder, text, id.
        encode: encoder, ASCII text -> ids; None where a word is too long.
    """

    make: Callable[[int, int, int, int], int]
    free: Callable[[int], None]
    add_token: Callable[[int, bytes, int], None]
    add_whole: Callable[[int, bytes, int], None]
    encode: Callable[[int, str], list[int] | None]


@dataclass(frozen=True, slots=True)
class Compiled:
    """Functions; arguments are addresses and numbers. See their sources.

    Attributes:
        match: chain, its length, index, what is found -> how many columns.
        rank: question, what is found -> how many choices there were.
        hash: tokens, number of blocks and of tokens in one, AES key, index keys -> how many blocks were hashed. None
            where this CPU has no instructions for it.
    """

    match: Callable[[int, int, int, int], int]
    rank: Callable[[int, int], int]
    hash: Hash | None
    words: WordFunctions


def open_compiled(directory: Path, compilers: Sequence[str]) -> Compiled | None:
    """What is compiled of the router, compiling it (a second or two) where `directory` lacks it.

    Args:
        directory, compilers: see `build_library`.

    Returns:
        None where there is no compiler, or it fails; the log says why.
    """
    path = build_library(_SOURCES, directory, compilers)
    functions = load_library(_SOURCES, path, keeps_lock=True) if path is not None else None
    if functions is None:
        return None
    logger.info("placement and tokenizing are compiled: %s", path)
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    match, rank = functions.BatonMatch, functions.BatonRank
    match.argtypes, match.restype = (pointer, count, pointer, pointer), count
    rank.argtypes, rank.restype = (pointer, pointer), count
    hash_tokens = getattr(functions, "BatonHash", None)
    if hash_tokens is not None:
        hash_tokens.argtypes, hash_tokens.restype = (ctypes.py_object, count, count, ctypes.c_char_p, pointer), count
    return Compiled(match, rank, hash_tokens, _word_functions(functions))


def _word_functions(functions: ctypes.CDLL) -> WordFunctions:
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    make, free, encode = functions.BatonWords, functions.BatonWordsFree, functions.BatonWordsEncode
    make.argtypes, make.restype = (count, pointer, pointer, count), pointer
    free.argtypes, free.restype = (pointer,), None
    encode.argtypes, encode.restype = (pointer, ctypes.py_object), ctypes.py_object
    for add in (functions.BatonWordsToken, functions.BatonWordsWhole):
        add.argtypes, add.restype = (pointer, ctypes.c_char_p, count), None
    return WordFunctions(make, free, functions.BatonWordsToken, functions.BatonWordsWhole, encode)
