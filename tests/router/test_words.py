"""Word by word, ASCII text has the ids that the tokenizer finds; of all else the tokenizer is asked."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel

from router import words as module
from router.words import Words
from tests.fakes import SPECIAL, make_tokenizer
from tests.router.test_text import sentencepiece_like

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
MARKS_AND_CASE = (  # as of Mistral Nemo and GPT-4o
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WITH_GAPS = r"\p{L}+|\p{N}+"
DOT_IS_ANY = r"(?m:a.)|[^a]+|a"  # `m` lets the dot match a line's end in the library's expressions, not in Python's
TEXT = "It's what THE Fox said (twice): don't count 1234 or 56789\tdays.\r\n\n  Then  it ended ... I'M sure\n" * 3


def cut_by(pattern: str, trained_on: str = TEXT) -> Tokenizer:
    """A trained tokenizer that cuts words as `pattern` says."""
    tokenizer = make_tokenizer()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([trained_on], trainer)
    tokenizer.add_special_tokens([AddedToken(SPECIAL[0], special=True, normalized=False)])
    return tokenizer


def random_texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    pieces = [*map(chr, range(128)), *8 * TEXT.split(" "), *40 * " "]
    return ["".join(rng.choices(pieces, k=rng.randrange(60))) for _ in range(300)]


@pytest.mark.parametrize("pattern", ["", QWEN, LLAMA_3, MARKS_AND_CASE])
@pytest.mark.parametrize("seed", range(3))
def test_ids_are_those_of_the_tokenizer(pattern: str, seed: int) -> None:
    tokenizer = cut_by(pattern) if pattern else make_tokenizer()
    words = Words.of(tokenizer)
    assert words is not None
    for text in (TEXT, *random_texts(seed)):
        for piece in (text, SPECIAL[0] + text):
            assert words.encode(piece) == tokenizer.encode(piece, add_special_tokens=False).ids, piece


def test_of_added_tokens_the_longest_counts() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<x>", normalized=False), AddedToken("<x>y<", normalized=False)])
    words = Words.of(tokenizer)
    assert words is not None
    assert words.encode("<x>y<c") == tokenizer.encode("<x>y<c", add_special_tokens=False).ids


def test_a_word_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WORDS", 300)
    words = Words.of(make_tokenizer())
    assert words is not None
    ids, encoded = words._ids, []
    tokenize = ids._tokenize
    ids._tokenize = lambda word: encoded.append(word) or tokenize(word)
    ids.clear()
    for _ in range(2):
        words.encode("once\nonce")
    assert encoded == ["once", "\u010a"]
    for number in range(500):
        words.encode(f"{number} {SPECIAL[0]}")
        assert len(ids) <= 300
    assert ids[SPECIAL[0]] == ids._added[SPECIAL[0]]  # which the model would take for text
    encoded.clear()
    words.encode("x" * 1000)
    words.encode("x" * 1000)
    assert len(encoded) == 2  # too long to be remembered


def test_the_tokenizer_is_asked_about_what_is_no_ascii_or_no_word() -> None:
    words = Words.of(make_tokenizer())
    assert words is not None
    assert words.encode("caf\u00e9") is None
    assert words.encode("") == []
    gaps = Words.of(cut_by(QWEN))
    assert gaps is not None
    gaps._find = module.re.compile(WITH_GAPS.replace(r"\p{L}", "[a-z]").replace(r"\p{N}", "[0-9]")).findall
    assert gaps.encode("a b") is None


def with_normalized_token() -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("zebra", normalized=True)])
    return tokenizer


def with_prefix_space() -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    return tokenizer


def that_lowers() -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def with_dropout() -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.model.dropout = 0.5
    return tokenizer


@pytest.mark.parametrize(
    "make", [sentencepiece_like, with_normalized_token, with_prefix_space, that_lowers, with_dropout]
)
def test_other_kinds_of_tokenizers_are_left_alone(make) -> None:
    assert Words.of(make()) is None


@pytest.mark.parametrize("pattern", [r"\h+|\H+", r"\p{Greek}+|\P{Greek}+", r"[a-z&&[^b]]+|[^a-z]+|b", DOT_IS_ANY])
def test_expressions_that_mean_something_else_in_python_are_left_alone(pattern: str) -> None:
    assert Words.of(cut_by(pattern, "a" * 50 + "b\na\n" * 50)) is None
