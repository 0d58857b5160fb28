"""Compiled, a text has the ids that the tokenizer finds; tokenizers of other kinds, and of other texts, are asked."""

from __future__ import annotations

import json
import random
import string

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from router.chat_template import ChatTemplate
from router.compiled.library import Compiled
from router.compiled.words import CompiledWords
from router.tokenizer import TextCodec
from router.words import BYTE_TO_PRINTABLE
from tests.fakes import CHAT_TEMPLATE, SPECIAL, make_tokenizer
from tests.router.conftest import run_cluster
from tests.router.test_words import LLAMA_3, MARKS_AND_CASE, QWEN, TEXT, cut_by, random_texts


def compile_words(compiled: Compiled, tokenizer: Tokenizer) -> CompiledWords:
    words = CompiledWords.of(compiled.words, tokenizer)
    assert words is not None
    return words


def with_all_pairs(pattern: str) -> Tokenizer:
    """Any two characters of a word become one token, so that ids tell where words were cut."""
    spec = json.loads((cut_by(pattern) if pattern else make_tokenizer()).to_str())
    letters = [BYTE_TO_PRINTABLE[byte] for byte in range(256)]
    pairs = [[left, right] for left in letters[:128] for right in letters[:128]]
    random.Random(0).shuffle(pairs)
    vocab = {token: token_id for token_id, token in enumerate([*letters, *map("".join, pairs)])}
    spec["model"] |= {"vocab": vocab, "merges": pairs}
    spec["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    names = ["<x>", "<x>y<", "[a]", "fox", "\n\n", "\u00e9"]
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    return tokenizer


@pytest.mark.parametrize("pattern", ["", QWEN, LLAMA_3])
@pytest.mark.parametrize("seed", range(3))
def test_ids_are_those_of_the_tokenizer(compiled: Compiled, pattern: str, seed: int) -> None:
    tokenizer, rng = with_all_pairs(pattern), random.Random(seed)
    words = compile_words(compiled, tokenizer)
    pieces = ["<x>", "<x>y<", "[a", "]", "fox", "\n", SPECIAL[0], "I've", "they'RE", "she'll", "'d"]
    for text in ("", TEXT, *random_texts(seed)):
        for asked in (text, "".join(rng.choices([*pieces, text], k=9))):
            assert words.encode(asked) == tokenizer.encode(asked, add_special_tokens=False).ids, asked


@pytest.mark.parametrize("pattern", ["", QWEN])
def test_more_words_than_are_remembered(compiled: Compiled, pattern: str) -> None:
    tokenizer, rng = cut_by(pattern) if pattern else make_tokenizer(), random.Random(0)
    words = compile_words(compiled, tokenizer)
    once = ["".join(rng.choices("foxthe", k=rng.randrange(1, 60))) for _ in range(100_000)]
    expected = [found.ids for found in tokenizer.encode_batch_fast(once, add_special_tokens=False)]
    for _ in range(2):
        assert [words.encode(word) for word in once] == expected


def test_a_word_that_no_merging_makes(compiled: Compiled) -> None:
    spec = json.loads(cut_by(LLAMA_3).to_str())
    vocab = spec["model"]["vocab"]
    vocab |= {"foxes": len(vocab) + 10, "\u0120fox\u00e9": len(vocab) + 11}  # é stands for a byte of its own
    for ignore_merges in (False, True):
        spec["model"]["ignore_merges"] = ignore_merges
        tokenizer = Tokenizer.from_str(json.dumps(spec))
        ids = compile_words(compiled, tokenizer).encode("foxes and fox foxes")
        assert ids == tokenizer.encode("foxes and fox foxes", add_special_tokens=False).ids
        assert (vocab["foxes"] in ids) is ignore_merges


def without_a_byte() -> Tokenizer:
    spec = json.loads(make_tokenizer().to_str())
    del spec["model"]["vocab"]["~"]
    return Tokenizer.from_str(json.dumps(spec))


@pytest.mark.parametrize("make", [lambda: cut_by(MARKS_AND_CASE), without_a_byte])
def test_other_kinds_of_tokenizers_are_left_alone(compiled: Compiled, make) -> None:
    assert CompiledWords.of(compiled.words, make()) is None


def test_a_tokenizer_that_differs_is_left_alone(compiled: Compiled, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<y>", special=True, rstrip=True)])
    assert CompiledWords.of(compiled.words, tokenizer) is None
    assert "differs from its kind" in caplog.text


def test_the_tokenizer_is_asked_about_what_is_no_ascii_or_too_long(compiled: Compiled) -> None:
    tokenizer = make_tokenizer()
    words = compile_words(compiled, tokenizer)
    assert words.encode("caf\u00e9") is None
    for size in (32, 33, 256):
        assert words.encode(size * "x") == tokenizer.encode(size * "x").ids
    assert words.encode(257 * "x") is None


def with_a_first_token() -> Tokenizer:
    tokenizer = make_tokenizer()
    first = [(SPECIAL[0], tokenizer.token_to_id(SPECIAL[0]))]
    tokenizer.post_processor = TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=first)
    return tokenizer


@pytest.mark.parametrize(
    "make", [make_tokenizer, with_a_first_token, lambda: cut_by(QWEN), lambda: cut_by(MARKS_AND_CASE)]
)
async def test_chats_and_prompts_have_the_same_ids(compiled: Compiled, make) -> None:
    template = ChatTemplate(CHAT_TEMPLATE, {})
    plain, fast = (TextCodec(make().to_str(), template, 0, 1000, None) for _ in range(2))
    fast.compile(compiled.words)
    rng, letters = random.Random(0), string.printable + "\u00e9"
    for _ in range(200):
        contents = ["".join(rng.choices([*letters, *SPECIAL, 300 * "x"], k=rng.randrange(60))) for _ in range(3)]
        messages = [{"role": "user", "content": content} for content in contents]
        assert await fast.encode_chat(messages, {}) == await plain.encode_chat(messages, {})
        for parse_special in (True, False):
            ids = await fast.encode_prompt(contents[0], parse_special)
            assert ids == await plain.encode_prompt(contents[0], parse_special)


async def test_a_gateway_tokenizes_compiled(tmp_path, compiled: Compiled, model_dir, answer_ids) -> None:
    async with run_cluster(model_dir, answer_ids, compile_cache=str(tmp_path)) as cluster:
        assert cluster.service.codec._compiled is not None
        messages = [{"role": "user", "content": "hello"}]
        reply = await cluster.client.chat.completions.create(model="demo", messages=messages, max_tokens=5)
        assert reply.usage.completion_tokens == 5
