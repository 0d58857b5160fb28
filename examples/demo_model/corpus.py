"""What the demo model reads: Python's documentation and standard library, split by project into train and held-out.

A *project* is a whole package with its documentation pages and its dialogues (``idlelib`` and ``library/idle``), so
nothing the held-out loss is measured on has a sibling file in training. Both sources come with Python under the PSF
licence.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from examples.demo_model.rest import Entry, clean_page, read_entries, split_sentences

HELD_OUT_CODE = frozenset(["idlelib", "wsgiref", "xmlrpc", "curses", "turtledemo", "dbm", "zoneinfo"])
HELD_OUT_PAGES = re.compile(
    r"(library/(idle|wsgiref|xmlrpc.*|curses.*|dbm|zoneinfo|mailbox)|howto/(curses|ipaddress))$"
)

SKIPPED_CODE = frozenset(
    [
        *("site-packages", "lib-dynload", "__pycache__", "__phello__", "test", "tests"),
        *("encodings", "pydoc_data", "lib2to3", "distutils", "ensurepip"),
    ]
)
SKIPPED_PAGES = re.compile(r"(distutils/|install/|whatsnew/2\.|whatsnew/changelog|license|contents|copyright)")
MAX_CODE_BYTES = 120_000  # a longer module is usually a table


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text to learn from."""

    kind: str  # "prose" or "code"
    held_out: bool
    source: str  # "library/json" or "json/decoder.py", for people
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """An entry of the documentation, and which side of the split its page is on."""

    entry: Entry
    held_out: bool
    source: str


def read_documents(docs: Path, stdlib: Path) -> list[Document]:
    """Pages of the documentation as prose, then modules of the standard library as code."""
    return [*_read_prose(docs), *_read_code(stdlib)]


def default_stdlib() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _page_files(docs: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(docs.rglob("*.rst.txt")):
        name = path.relative_to(docs).as_posix().removesuffix(".rst.txt")
        if not SKIPPED_PAGES.match(name):
            yield name, path


def _read_prose(docs: Path) -> Iterator[Document]:
    for name, path in _page_files(docs):
        text = clean_page(path.read_text(encoding="utf-8"))
        yield Document(kind="prose", held_out=bool(HELD_OUT_PAGES.match(name)), source=name, text=text)


def _code_files(stdlib: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        if not SKIPPED_CODE.intersection(parts) and path.stat().st_size <= MAX_CODE_BYTES:
            yield "/".join(parts), path


def _read_code(stdlib: Path) -> Iterator[Document]:
    for name, path in _code_files(stdlib):
        text = path.read_text(encoding="utf-8", errors="ignore").expandtabs(4)
        if text.strip():
            yield Document(kind="code", held_out=name.split("/")[0] in HELD_OUT_CODE, source=name, text=text)


def read_described(docs: Path, stdlib: Path) -> list[Described]:
    """Every described name and topic: the documentation's entries, the glossary's terms, the library's docstrings."""
    found: list[Described] = []
    for name, path in _page_files(docs):
        if name.startswith(("whatsnew/", "c-api/", "bugs", "about")):
            continue
        source = path.read_text(encoding="utf-8")
        entries = read_glossary(source) if name == "glossary" else read_entries(source)
        held_out = bool(HELD_OUT_PAGES.match(name))
        found.extend(Described(entry=entry, held_out=held_out, source=name) for entry in entries)
    documented = {described.entry.name for described in found}
    for name, path in _code_files(stdlib):
        held_out = name.split("/")[0] in HELD_OUT_CODE
        for entry in read_docstrings(name, path.read_text(encoding="utf-8", errors="ignore")):
            if entry.name not in documented:
                found.append(Described(entry=entry, held_out=held_out, source=name))
    return found


def read_glossary(source: str) -> list[Entry]:
    """The terms of the glossary page: a term is indented by three, its definition by six."""
    blocks = re.split(r"\n   (?=[A-Za-z])", source)[1:]
    entries = []
    for block in blocks:
        term, _, body = block.partition("\n")
        page = "Term\n====\n\n" + re.sub(r"^      ", "", body, flags=re.MULTILINE)
        sections = [entry for entry in read_entries(page) if entry.kind == "section"]
        if sections:
            entries.append(Entry(kind="term", name=term.strip(), module="", title=term.strip(), text=sections[0].text))
    return entries


def read_docstrings(name: str, source: str) -> Iterator[Entry]:
    """Public functions and classes of a module that have a docstring whose first paragraph is a sentence."""
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if any(part.startswith("_") for part in module.split(".")):
        return
    for owner, node in _named_nodes(ast.parse(source).body, module):
        docstring = ast.get_docstring(node) or ""
        first = re.sub(r"\s+", " ", docstring.split("\n\n")[0]).strip()
        if 24 <= len(first) <= 300 and first[0].isupper() and first.endswith(".") and len(split_sentences(first)) <= 3:
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield Entry(kind=kind, name=f"{owner}.{node.name}", module=module, title="", text=first)


def _named_nodes(
    body: list[ast.stmt], owner: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield owner, node
            if isinstance(node, ast.ClassDef):
                yield from _named_nodes(node.body, f"{owner}.{node.name}")
