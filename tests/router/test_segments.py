"""Encoding by segments is encoding as a whole, whatever the tokenizer does around its added tokens."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from router.chat_template import ChatTemplate
from router.segments import Segments
from router.tokenizer import TextCodec
from tests.fakes import SPECIAL, make_tokenizer
from tests.router.test_text import TEXTS, sentencepiece_like

PIECES = (*TEXTS, *SPECIAL, "<s>", "<x>", "<x>y", " ", "  the fox", "A", "\n")


def with_prefix_space() -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def that_prepends() -> Tokenizer:
    tokenizer = sentencepiece_like()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def with_metaspace() -> Tokenizer:
    tokenizer = sentencepiece_like()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


def with_overlapping_tokens() -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<x>", normalized=False), AddedToken("<x>y<", normalized=False)])
    tokenizer.add_tokens([AddedToken("the", normalized=True, lstrip=True)])
    return tokenizer


def that_strips() -> Tokenizer:
    """Cutting at `<x>` would leave spaces to its left that the tokenizer takes away."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<x>", special=True, lstrip=True, rstrip=True)])
    return tokenizer


def of_words() -> Tokenizer:
    vocab = {word: index for index, word in enumerate(("<unk>", "<x>", "the", "fox", "y"))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<x>", special=True, single_word=True)])
    return tokenizer


KINDS = (
    make_tokenizer, sentencepiece_like, with_prefix_space, that_prepends, with_metaspace, with_overlapping_tokens,
    that_strips, of_words,
)  # fmt: skip


@pytest.mark.parametrize("make", KINDS)
async def test_ids_are_those_of_the_whole_text(make: Callable[[], Tokenizer]) -> None:
    tokenizer, rng = make(), random.Random(0)
    codec = TextCodec(tokenizer.to_str(), ChatTemplate("{{ messages[0].content }}", {}), 0, 1000, None)
    for _ in range(300):  # many of the segments come back
        text = "".join(rng.choices(PIECES, k=rng.randrange(1, 9)))
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert await codec._encode_segments(text) == expected, text


def test_texts_are_cut_before_added_tokens() -> None:
    segments = Segments(with_overlapping_tokens().get_added_tokens_decoder())
    assert segments.cut("a<x>b<x>y<c<x>") == ["a", "<x>b", "<x>y<c", "<x>"]
    assert segments.cut("") == [""]
    assert Segments(that_strips().get_added_tokens_decoder()).cut("a<x>b") == ["a<x>b"]


def test_the_least_recently_used_is_forgotten() -> None:
    segments = Segments({}, max_bytes=1000)
    for piece in "abc":
        segments.remember({piece: [1] * 20})
    segments.find(["a"])
    segments.remember({"d": [1] * 20})
    assert [ids is not None for ids in segments.find("abcd")] == [True, False, True, True]
    segments.remember({"e": [1] * 1000})  # larger than all the room
    assert len(segments) == 0


async def test_a_conversation_that_comes_back_is_not_encoded_again() -> None:
    codec = TextCodec(make_tokenizer().to_str(), None, 0, 1000, None)
    encoded: list[str] = []
    encode = codec._encode_new

    async def note(pieces: list[str]) -> dict[str, list[int]]:
        encoded.extend(pieces)
        return await encode(pieces)

    codec._encode_new = note  # type: ignore[method-assign]
    turn = f"{SPECIAL[0]}first\n"
    await codec._encode_segments(turn)
    await codec._encode_segments(f"{turn}{SPECIAL[0]}second\n")
    assert encoded == [turn, f"{SPECIAL[0]}second\n"]
