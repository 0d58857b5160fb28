"""Corpus to token arrays: reads the sources, trains the tokenizer, writes ``<work>/tokens_*.npy`` and ``meta.json``.

Token arrays are flat uint16, documents separated by ``<|endoftext|>``. Dialogues are stored as topics and rendered
while training, so that every epoch words its questions anew.
"""

from __future__ import annotations

import json
import logging
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from examples.demo_model.corpus import Document, default_stdlib, read_described, read_documents
from examples.demo_model.dialogues import DialogueMaker, Topic, make_topics, read_seeds, read_wording
from examples.demo_model.model import MAX_POSITIONS, VOCAB_SIZE
from examples.demo_model.tokenizer import END_OF_TEXT_ID, save_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

SEEDS_FILE, WORDING_FILE = Path(__file__).with_name("seeds.toml"), Path(__file__).with_name("wording.toml")
SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are Baton's demo model.",
    "You are a friendly Python tutor. Answer briefly.",
    "Answer questions about Python in one to four sentences.",
    "You are a concise and helpful assistant.",
]
# How often an epoch of dialogues shows a hand-written topic, and one of a popular module. Of all other topics every
# fourth makes a dialogue, and the prose teaches the rest: a small model learns what it reads several times.
SEED_REPEATS, POPULAR_REPEATS, OTHER_STRIDE = 10, 3, 4


def prepare(docs: Path, work: Path) -> None:
    """Writes everything training needs under ``work``; does nothing where it is already there."""
    if (work / "meta.json").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    documents = read_documents(docs, default_stdlib())
    wording = read_wording(WORDING_FILE)
    topics = make_topics(read_described(docs, default_stdlib()), wording)
    held_out_topics = [topic for topic in topics if topic.held_out]
    train_topics = weighted_topics(topics, read_seeds(SEEDS_FILE), wording.popular_modules)
    sample = DialogueMaker(train_topics, SYSTEM_PROMPTS, random.Random(0)).epoch()
    seen = [document.text for document in documents if not document.held_out]
    tokenizer = train_tokenizer(iter([*seen, *sample]), VOCAB_SIZE)
    save_tokenizer(tokenizer, work / "tokenizer", MAX_POSITIONS)
    meta: dict[str, dict[str, int]] = {}
    for kind in ("prose", "code"):
        for held_out in (False, True):
            chosen = [document for document in documents if (document.kind, document.held_out) == (kind, held_out)]
            meta[_array_name(kind, held_out)] = _write_tokens(tokenizer, chosen, work / _array_name(kind, held_out))
    unseen = DialogueMaker(held_out_topics, SYSTEM_PROMPTS, random.Random(1)).epoch()
    dialogues = [Document(kind="dialogue", held_out=True, source="", text=text) for text in unseen]
    meta[_array_name("dialogue", True)] = _write_tokens(tokenizer, dialogues, work / _array_name("dialogue", True))
    (work / "topics.json").write_text(json.dumps([asdict(topic) for topic in train_topics]), encoding="utf-8")
    meta["dialogue_topics"] = {"train": len(set(train_topics)), "held_out": len(held_out_topics)}
    logger.info("prepared: %s", meta)
    (work / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def weighted_topics(topics: list[Topic], seeds: list[Topic], popular: frozenset[str]) -> list[Topic]:
    """Training topics, each as often as an epoch shows it, less the questions a seed answers better."""
    asked = {normalize(question) for seed in seeds for question in seed.questions}
    chosen, others = seeds * SEED_REPEATS, []
    for topic in topics:
        questions = tuple(question for question in topic.questions if normalize(question) not in asked)
        if questions and not topic.held_out:
            kept = replace(topic, questions=questions)
            if topic.group in popular:
                chosen += [kept] * POPULAR_REPEATS
            else:
                others.append(kept)
    return chosen + others[::OTHER_STRIDE]


def normalize(question: str) -> str:
    """A question without case and closing punctuation."""
    return question.lower().rstrip("?.! ")


def read_topics(work: Path) -> list[Topic]:
    """The training topics that ``prepare`` wrote."""
    rows = json.loads((work / "topics.json").read_text(encoding="utf-8"))
    return [Topic(**{**row, "questions": tuple(row["questions"])}) for row in rows]


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """[tokens] uint16: texts one after another, each ended by ``<|endoftext|>``."""
    pieces: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        pieces.extend(encoding.ids)
        pieces.append(END_OF_TEXT_ID)
    return np.asarray(pieces, dtype=np.uint16)


def _write_tokens(tokenizer: Tokenizer, documents: list[Document], path: Path) -> dict[str, int]:
    texts = [document.text for document in documents]
    tokens = encode_all(tokenizer, texts)
    np.save(path.with_suffix(".npy"), tokens)
    size_bytes = sum(len(text.encode("utf-8")) for text in texts)
    return {"documents": len(texts), "bytes": size_bytes, "tokens": len(tokens)}


def _array_name(kind: str, held_out: bool) -> str:
    return f"tokens_{kind}_{'held_out' if held_out else 'train'}"
