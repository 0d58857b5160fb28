"""Documentation entries to questions and answers, and dialogues in ChatML.

An entry has one answer, worded the same each time, and many questions: so a model of a few million parameters spends
its memory on what the documentation says and not on ways to say it.
"""

from __future__ import annotations

import random
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from examples.demo_model.corpus import Described
from examples.demo_model.rest import Entry, split_sentences

MAX_ANSWER_CHARS = 420
CALLABLE_KINDS = frozenset(
    [
        *("function", "coroutinefunction", "awaitablefunction", "decorator"),
        *("method", "classmethod", "staticmethod", "coroutinemethod", "abstractmethod", "awaitablemethod"),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """The contents of ``wording.toml``."""

    verbs: frozenset[str]
    popular_modules: frozenset[str]
    questions: dict[str, tuple[str, ...]]  # kind of entry -> templates


@dataclass(frozen=True, kw_only=True, slots=True)
class Topic:
    """One answer and the questions it answers."""

    questions: tuple[str, ...]
    answer: str
    group: str  # topics of one group may follow each other in a conversation
    held_out: bool


def read_wording(path: Path) -> Wording:
    """Verbs and question templates."""
    with path.open("rb") as file:
        table = tomllib.load(file)
    return Wording(
        verbs=frozenset(table["verbs"]),
        popular_modules=frozenset(table["popular_modules"]),
        questions={kind: tuple(templates) for kind, templates in table["questions"].items()},
    )


def read_seeds(path: Path) -> list[Topic]:
    """Hand-written topics: greetings, who the model is, what a newcomer asks first."""
    with path.open("rb") as file:
        seeds = tomllib.load(file)["seed"]
    return [
        Topic(questions=tuple(seed["questions"]), answer=answer, group=f"seed {seed['group']}", held_out=False)
        for seed in seeds
        for answer in seed["answers"]
    ]


def make_topics(described: list[Described], wording: Wording) -> list[Topic]:
    """One topic per entry that makes a legible one; names described twice keep their first description."""
    topics: list[Topic] = []
    seen: set[str] = set()
    for item in described:
        entry = item.entry
        if entry.name.lower() in seen or not _is_presentable(entry):
            continue
        seen.add(entry.name.lower())
        group = entry.module or item.source.split("/")[0]
        questions, answer = questions_about(entry, wording), answer_about(entry, wording.verbs)
        topics.append(Topic(questions=questions, answer=answer, group=group, held_out=item.held_out))
        task = _task_of(entry, wording.verbs)
        if task and task not in seen:
            seen.add(task)
            questions = tuple(template.format(n=task) for template in wording.questions["how_to"])
            answer = f"Use `{entry.name}()`. " + answer.replace(f"`{entry.name}()`", "It", 1)
            topics.append(Topic(questions=questions, answer=answer, group=group, held_out=item.held_out))
    return topics


def _is_presentable(entry: Entry) -> bool:
    if not re.fullmatch(r"[\w .,'?()/+:&`-]{2,80}", entry.name) or not len(entry.text) >= 20:
        return False
    if entry.kind == "section" and (" --- " in entry.name or len(entry.name) < 4 or entry.name[0].isdigit()):
        return False
    return entry.text[0].isupper() or entry.text[0] in "`\"'("


def shorten(text: str) -> str:
    """The first one to four sentences that fit, as one paragraph."""
    sentences = [sentence for paragraph in text.split("\n\n") for sentence in split_sentences(paragraph)]
    sentences = [re.sub(r"\s*\((?:see|See|Contributed)[^()]*\)", "", sentence) for sentence in sentences]
    kept = sentences[:1]
    for sentence in sentences[1:4]:
        if len(" ".join([*kept, sentence])) > MAX_ANSWER_CHARS:
            break
        kept.append(sentence)
    answer = re.sub(r"\s+(?=[),.;])", "", " ".join(kept)).replace("---", "-").replace(" -- ", " - ").strip()
    return answer if answer.endswith((".", "!", "?")) else answer + "."


def answer_about(entry: Entry, verbs: frozenset[str]) -> str:
    """The entry's description, begun so that the first words name what was asked."""
    text = shorten(entry.text)
    first = text.partition(" ")[0]
    if entry.kind == "module":
        purpose = entry.title.partition("---")[2].strip()
        opening = f"The `{entry.name}` module is in Python's standard library"
        return f"{opening}: {_lower_first(purpose)}. {text}" if purpose else text
    if entry.kind == "term":
        is_noun_phrase = first in ("A", "An", "The", "Any")
        return f"{_article(entry.name)} {entry.name} is {_lower_first(text)}" if is_noun_phrase else text
    return text if entry.kind == "section" else _answer_about_name(entry, text, verbs)


def _answer_about_name(entry: Entry, text: str, verbs: frozenset[str]) -> str:
    """``Return the sum.`` becomes "`x()` returns the sum."; a noun phrase becomes "`x` is a ..."."""
    first, _, rest = text.partition(" ")
    is_callable = entry.kind in CALLABLE_KINDS
    name = f"`{entry.name}()`" if is_callable else f"`{entry.name}`"
    if first.lower() in verbs and first[0].isupper():
        return f"{name} {third_person(first.lower())} {_conjugate_second(rest, verbs)}"
    if first.lower() in {third_person(verb) for verb in verbs}:
        return f"{name} {first.lower()} {rest}"
    if first in ("Is", "Same"):
        return f"{name} is {rest}" if first == "Is" else f"{name} is the same {rest}"
    if first in ("A", "An", "The") and not is_callable:
        return f"{name} is {_lower_first(text)}"
    return text if entry.name.rsplit(".", 1)[-1] in text else f"{name}: {_lower_first(text)}"


def _conjugate_second(rest: str, verbs: frozenset[str]) -> str:
    """The ``and return`` of "create and return a node" after its first verb has become "creates"."""
    match = re.match(r"and ([a-z]+)\b", rest)
    if match and match.group(1) in verbs:
        return f"and {third_person(match.group(1))}{rest[match.end() :]}"
    return rest


def third_person(verb: str) -> str:
    """``return`` to ``returns``."""
    if verb.endswith(("s", "sh", "ch", "x", "o")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


def _lower_first(text: str) -> str:
    return text[0].lower() + text[1:] if len(text) > 1 and text[0].isupper() and not text[1].isupper() else text


def questions_about(entry: Entry, wording: Wording) -> tuple[str, ...]:
    """Ways a newcomer asks about an entry."""
    name = entry.name
    if entry.kind == "section" and name.endswith("?"):
        return (name, name, _lower_first(name))
    kind = "callable" if entry.kind in CALLABLE_KINDS else entry.kind
    templates = wording.questions.get(kind, wording.questions["other"])
    plain = _lower_first(name) if kind == "section" else name
    return tuple(template.format(n=plain, N=name, a=_article(name).lower()) for template in templates)


def _article(noun: str) -> str:
    return "An" if noun[0].lower() in "aeiou" else "A"


def _task_of(entry: Entry, verbs: frozenset[str]) -> str:
    """``remove all items from the list`` for an entry that begins so, or nothing."""
    sentence = split_sentences(entry.text)[0]
    first = sentence.partition(" ")[0].lower()
    suits = entry.kind in CALLABLE_KINDS and first in verbs - {"return", "raise", "see", "implement"}
    if not suits or not 15 <= len(sentence) <= 80 or not re.fullmatch(r"[\w ,'-]+\.", sentence):
        return ""
    return _lower_first(sentence).rstrip(".")


def render_dialogue(messages: list[tuple[str, str]]) -> str:
    """Messages as (role, text) in ChatML: what the chat template in ``tokenizer.py`` renders."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)


class DialogueMaker:
    """Draws dialogues of one to three topics; every topic appears once per epoch, in a new order and wording."""

    def __init__(self, topics: list[Topic], system_prompts: list[str], rng: random.Random) -> None:
        """``topics`` may hold a topic several times; ``rng`` is advanced by every epoch."""
        self._topics = topics
        self._system_prompts = system_prompts
        self._rng = rng

    def epoch(self) -> list[str]:
        """One dialogue text per few topics, in random order."""
        by_group = sorted(self._topics, key=lambda topic: (topic.group, self._rng.random()))
        dialogues = []
        while by_group:
            first = by_group.pop()
            taken = [first]
            while by_group and len(taken) < 3 and by_group[-1].group == first.group and self._rng.random() < 0.25:
                taken.append(by_group.pop())
            dialogues.append(self._render(taken))
        self._rng.shuffle(dialogues)
        return dialogues

    def _render(self, topics: list[Topic]) -> str:
        messages: list[tuple[str, str]] = []
        if self._rng.random() < 0.12:
            messages.append(("system", self._rng.choice(self._system_prompts)))
        for topic in topics:
            messages += [("user", self._rng.choice(topic.questions)), ("assistant", topic.answer)]
        return render_dialogue(messages)
