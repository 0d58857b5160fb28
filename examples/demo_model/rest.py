"""reStructuredText of Python's documentation to plain English, and to named entries.

Two readers of one format, both forgiving (a toy corpus does not need a full parser):

* ``clean_page``    a whole page as plain text, markup and bookkeeping removed;
* ``read_entries``  the things a page describes (functions, classes, modules, sections), each with a short description.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

API_DIRECTIVES = frozenset(
    [
        *("function", "coroutinefunction", "awaitablefunction", "decorator", "class", "attribute", "data", "exception"),
        *("method", "classmethod", "staticmethod", "coroutinemethod", "abstractmethod", "awaitablemethod", "opcode"),
    ]
)
PROSE_DIRECTIVES = frozenset(["note", "warning", "tip", "important", "impl-detail"])
CODE_DIRECTIVES = frozenset(["code-block", "doctest", "testcode", "sourcecode", "code"])
HEADING_MARKS = frozenset("=-*^~\"'+#")

DIRECTIVE = re.compile(r"^( *)\.\. ([a-z:-]+)::\s*(.*)$")
COMMENT = re.compile(r"^( *)\.\.(\s|$)")
ROLE = re.compile(r":(?:[a-z]+:)?([a-zA-Z]+):`([^`]*)`")
EXPLICIT_TITLE = re.compile(r"^(.*?)\s*<[^<>]*>$", re.DOTALL)
SENTENCE_END = re.compile(r"(?<=[.!?])[\")]?\s+(?=[A-Z`\"(])")
NOT_PROSE = re.compile(r">>>|[*+-] |\d+\. |#\. |[|+=]|\(\d+\)|\.\.|import |from .* import ")
ABBREVIATION = re.compile(r"(?:e\.g|i\.e|etc|vs|cf|[A-Z])\.$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One thing a page describes."""

    kind: str  # "function", "method", "class", ..., "module", "section", "term"
    name: str  # fully qualified where the page allows it: "os.path.join"
    module: str  # "os.path"; "" for the built-ins and for pages about no module
    title: str  # a module's heading; otherwise the signature, or "" where there is none
    text: str  # one to three plain paragraphs, joined by blank lines


def clean_inline(text: str) -> str:
    """Inline markup to plain text: roles, links, emphasis, footnotes, literals (which keep one backtick)."""
    text = ROLE.sub(_plain_role, text)
    text = re.sub(r"`([^`<>]+?)\s*<[^`<>]+>`__?", r"\1", text)
    text = re.sub(r"\*\\\*+(\w+)\*", r"\1", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    text = re.sub(r" ?\[#?[\w-]*\]_", "", text)
    text = re.sub(r"(?<![\w*])\*\*([^*\n]+)\*\*(?![\w*])", r"\1", text)
    text = re.sub(r"(?<![\w*`'(])\*([A-Za-z_][^*\n]*)\*(?![\w*])", r"\1", text)
    text = re.sub(r"(?<=\()\*([A-Za-z_][^*\n]*)\*(?![\w*])", r"\1", text)
    text = re.sub(r"`([^`\n]+)`_\b", r"\1", text)
    return re.sub(r"\\(?=[ *`_])[ ]?", "", text)


def _plain_role(match: re.Match[str]) -> str:
    role, target = match.group(1), match.group(2)
    title = EXPLICIT_TITLE.match(target)
    if title and title.group(1):
        return title.group(1)
    if role in ("pep", "rfc"):
        return f"{role.upper()} {target}"
    if role in ("issue", "gh"):
        return f"issue {target}"
    if role == "ref":
        return "the section on " + target.strip("!~").replace("-", " ").replace("_", " ")
    name = target.lstrip("!")
    if name.startswith("~"):
        name = name[1:].rsplit(".", 1)[-1]
    return name + "()" if role in ("func", "meth") and not name.endswith(")") else name


def clean_page(source: str) -> str:
    """A page as plain text: headings, prose and code examples, in the page's own order."""
    lines = source.expandtabs(8).splitlines()
    kept: list[str] = []
    index = 0
    while index < len(lines):
        line = lines[index]
        directive = DIRECTIVE.match(line)
        if directive:
            name = directive.group(2)
            if name in API_DIRECTIVES:
                kept.append(directive.group(1) + clean_inline(directive.group(3)))
            elif name not in PROSE_DIRECTIVES | CODE_DIRECTIVES:
                index = _skip_body(lines, index)
                continue
        elif COMMENT.match(line):
            index = _skip_body(lines, index)
            continue
        elif is_heading(lines, index):
            kept.extend(["# " + clean_inline(line.strip()), ""])
            index += 2
            continue
        elif not _is_noise(line):
            kept.append(line.rstrip())
        index += 1
    text = clean_inline("\n".join(kept))
    text = re.sub(r"::[ ]*$", ":", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _is_noise(line: str) -> bool:
    """Rulers, table borders, field lists such as ``:noindex:``."""
    stripped = line.strip()
    if re.fullmatch(r":[a-z-]+:(\s.*)?", stripped):
        return True
    return len(stripped) > 3 and not set(stripped) - set("=-+*~^# |")


def _skip_body(lines: list[str], index: int) -> int:
    """The index after the block that starts at ``index`` and everything indented under it."""
    indent = _indent(lines[index])
    index += 1
    while index < len(lines) and (not lines[index].strip() or _indent(lines[index]) > indent):
        index += 1
    return index


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def is_heading(lines: list[str], index: int) -> bool:
    """Whether a line is a title: flush left and underlined by one repeated mark."""
    if index + 1 >= len(lines) or not lines[index].strip() or lines[index][0] == " ":
        return False
    title, rule = lines[index].strip(), lines[index + 1].strip()
    return len(set(rule)) == 1 and rule[0] in HEADING_MARKS and len(rule) >= max(4, len(title) - 4) and title != rule


def read_entries(source: str) -> list[Entry]:
    """Every function, class, module and section of a page that has a description of its own."""
    lines = source.expandtabs(8).splitlines()
    entries: list[Entry] = []
    module, heading = "", ""
    classes: list[tuple[int, str]] = []  # (indent, name) of the class directives we are inside of
    for index, line in enumerate(lines):
        if is_heading(lines, index):
            heading = clean_inline(line.strip())
            text = describe(lines, index + 2, indent=-1)
            entries.append(Entry(kind="section", name=heading, module=module, title=heading, text=text))
            continue
        directive = DIRECTIVE.match(line)
        if not directive:
            continue
        indent, kind, argument = len(directive.group(1)), directive.group(2), directive.group(3)
        if kind in ("module", "currentmodule"):
            module = argument.strip()
            if kind == "module":
                text = describe(lines, _skip_body(lines, index), indent=-1)
                entries.append(Entry(kind="module", name=module, module=module, title=heading, text=text))
        elif kind in API_DIRECTIVES and argument:
            classes = [pair for pair in classes if pair[0] < indent]
            name = qualified_name(argument, module, classes)
            text = describe(lines, _first_blank(lines, index), indent=indent)
            entries.append(Entry(kind=kind, name=name, module=module, title=argument, text=text))
            if kind in ("class", "exception"):
                classes.append((indent, name))
    return [entry for entry in entries if entry.text]


def qualified_name(signature: str, module: str, classes: list[tuple[int, str]]) -> str:
    """``dump(obj, fp)`` on the page of json is ``json.dump``; a method takes its class's name too."""
    name = re.split(r"[(\s\[:]", clean_inline(signature).strip(), maxsplit=1)[0].strip("`*\\")
    owner = classes[-1][1] if classes else module
    if not owner or name == owner or name.startswith(owner + "."):
        return name
    short_owner = owner.rsplit(".", 1)[-1]
    if classes and name.startswith(short_owner + "."):
        return owner.rsplit(".", 1)[0] + "." + name if "." in owner else name
    if module and name.startswith(module.split(".")[0] + "."):
        return name
    return f"{owner}.{name}"


def _first_blank(lines: list[str], index: int) -> int:
    """The end of a directive's own lines: further signatures and options come before the first blank line."""
    while index < len(lines) and lines[index].strip():
        index += 1
    return index


def describe(lines: list[str], index: int, indent: int) -> str:
    """The first plain paragraphs from ``index`` on that belong to a block indented more than ``indent``."""
    paragraphs: list[str] = []
    current: list[str] = []
    while index < len(lines) and len(paragraphs) < 3:
        line = lines[index]
        if not line.strip():
            _close_paragraph(paragraphs, current)
        elif _indent(line) <= indent or is_heading(lines, index):
            break
        elif DIRECTIVE.match(line) or COMMENT.match(line):
            _close_paragraph(paragraphs, current)
            if paragraphs:
                break
            index = _skip_body(lines, index)
            continue
        elif not (_is_noise(line) or re.match(r"\s*(:[a-z-]+:(\s|$)|:source:`|\*\*Source)", line)) or current:
            current.append(line)
        index += 1
    _close_paragraph(paragraphs, current)
    return "\n\n".join(_prose_prefix(paragraphs))


def _close_paragraph(paragraphs: list[str], current: list[str]) -> None:
    if current:
        first = _indent(current[0])
        mark = "\0" if paragraphs and first > 0 and paragraphs[-1].endswith("::") else ""
        paragraphs.append(mark + " ".join(line.strip() for line in current))
        current.clear()


def _prose_prefix(paragraphs: list[str]) -> list[str]:
    """Paragraphs up to the first code block, list or table, cleaned; a sentence that introduces code is dropped."""
    kept: list[str] = []
    for paragraph in paragraphs:
        if paragraph.startswith("\0") or NOT_PROSE.match(paragraph):
            break
        if paragraph.startswith("**Source"):
            continue
        sentences = split_sentences(clean_inline(paragraph))
        if paragraph.rstrip().endswith(":"):
            sentences.pop()
        if not sentences or not re.match(r"[A-Z`\"'(a-z_]", sentences[0]):
            break
        kept.append(" ".join(sentences))
        if paragraph.rstrip().endswith(":"):
            break
    return kept


def split_sentences(text: str) -> list[str]:
    """Sentences of a paragraph; "e.g." and initials do not end one."""
    sentences: list[str] = []
    for piece in SENTENCE_END.split(re.sub(r"\s+", " ", text).strip()):
        if sentences and ABBREVIATION.search(sentences[-1]):
            sentences[-1] += " " + piece
        elif piece:
            sentences.append(piece)
    return sentences
