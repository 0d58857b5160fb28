"""Only the next position of the current epoch."""

from __future__ import annotations

import random

import pytest

from engine_core.messages import TokenChunk
from router.journal import Journal


def feed(journal: Journal, chunk: TokenChunk) -> list[int]:
    accepted = []
    following: TokenChunk | None = chunk
    while following is not None and journal.accept(following):
        accepted += following.token_ids
        following = journal.next_early()
    return accepted


def test_early_chunks_wait_for_the_first() -> None:
    journal = Journal()
    assert feed(journal, TokenChunk("r", 0, 1, [11])) == []
    assert feed(journal, TokenChunk("r", 0, 2, [12, 13])) == []
    assert feed(journal, TokenChunk("r", 0, 0, [10])) == [10, 11, 12, 13]
    assert feed(journal, TokenChunk("r", 0, 3, [99])) == []


def test_restart_drops_what_came_of_older_attempts() -> None:
    journal = Journal()
    feed(journal, TokenChunk("r", 0, 0, [10]))
    feed(journal, TokenChunk("r", 0, 2, [12]))
    assert journal.restart() == 1
    assert journal.start == 1
    assert feed(journal, TokenChunk("r", 0, 1, [77])) == []
    assert feed(journal, TokenChunk("r", 1, 1, [11])) == [11]
    assert journal.token_ids == [10, 11]


@pytest.mark.parametrize("seed", range(50))
def test_any_order_with_duplicates_gives_the_answer(seed: int) -> None:
    rng = random.Random(seed)
    chunks, position = [], 0
    while position < 40:
        size = rng.randrange(1, 4)
        chunks.append(TokenChunk("r", 0, position, list(range(position, position + size))))
        position += size
    journal = Journal()
    order = chunks + rng.choices(chunks, k=10)
    rng.shuffle(order)
    accepted = [token for chunk in order for token in feed(journal, chunk)]
    assert accepted == journal.token_ids == list(range(position))
