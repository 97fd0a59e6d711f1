"""The built-in corpus: the documentation of the Python standard library, as pages and as dialogues.

It is the same for a Python version and a seed, on every machine. Seeds 0, 1, 2, ... ask about the same objects in
other words and another order, so the corpus never ends.
"""

import random
import textwrap
from collections.abc import Iterator, Sequence

from chatsae.batch import Dialogue, Document, Split
from chatsae.data.pydocs.chats import Catalogue, dialogue
from chatsae.data.pydocs.library import SHARES, PyObject, dropped, objects, split_of

__all__ = ["SHARES", "dialogues", "documents", "dropped", "objects", "split_of"]

SOURCE = "pydocs"


def documents(split: Split, seed: int = 0) -> Iterator[Document]:
    """Plain pages in a random order: one per topic, per class, and per module with its functions of this split.

    Raises:
        UserError: see `objects`.
    """
    pages = _pages(objects(split))
    rng = random.Random(f"{SOURCE}/documents/{split}/{seed}")
    rng.shuffle(pages)
    for members in pages:
        layout = rng.choice((_as_pydoc, _as_text, _as_markdown))
        yield Document(id=f"{SOURCE}/{members[0].name}/{seed}", source=SOURCE, text=layout(members))


def dialogues(split: Split, seed: int = 0) -> Iterator[Dialogue]:
    """Multi-turn chats about the documented objects of a split, in a random order.

    The id ends with the number of the dialogue about its object: seed 0 has the first ones, seed 1 the next.

    Raises:
        UserError: see `objects`.
    """
    catalogue = Catalogue.of(objects(split))
    asked = [(o, i) for o in catalogue.subjects for i in range(catalogue.dialogues_about(o))]
    random.Random(f"{SOURCE}/dialogues/{split}/{seed}").shuffle(asked)
    for o, i in asked:
        number = seed * catalogue.dialogues_about(o) + i
        messages = dialogue(o, catalogue, random.Random(f"{SOURCE}/{o.name}/{number}"))
        yield Dialogue(id=f"{SOURCE}/{o.name}/{number}", source=SOURCE, messages=messages)


def _pages(found: Sequence[PyObject]) -> list[list[PyObject]]:
    """Objects that share a page, the first of which gives it its heading; pages without a docstring are left out."""
    pages: dict[tuple[str, str], list[PyObject]] = {}
    for o in found:
        loose = o.kind in ("module", "function")
        pages.setdefault(("module", o.module) if loose else ("unit", o.unit), []).append(o)
    return [members for members in pages.values() if any(o.doc for o in members)]


def _line(o: PyObject) -> str:
    """An object's first line: what it is, its name and its signature."""
    if o.kind == "class":
        bases = f"({', '.join(o.bases)})" if o.bases else ""
        return f"class {o.short}{bases}"
    return f"{o.flavour} {o.short}{o.signature}".strip() if o.kind in ("function", "method") else o.name


def _heading(o: PyObject) -> str:
    if o.kind == "topic":
        return f"Help on {o.short}"
    return f"Help on {o.kind} {o.short} in module {o.module}" if o.kind == "class" else f"Help on module {o.module}"


def _as_pydoc(members: Sequence[PyObject]) -> str:
    """As `pydoc` prints it: bodies indented, a bar beside those of a class."""
    bar = " |  " if members[0].kind == "class" else "    "
    bodies = [
        o.doc if o.kind in ("module", "topic") else f"{_line(o)}\n{textwrap.indent(o.doc, '    ')}".rstrip()
        for o in members
        if o.doc or o.kind not in ("module", "topic")
    ]
    lines = [f"{bar}{line}".rstrip() for line in "\n\n".join(bodies).splitlines()]
    return "\n".join([f"{_heading(members[0])}:", "", *lines])


def _as_text(members: Sequence[PyObject]) -> str:
    """Headings with full names, underlined, and flush bodies."""
    parts = []
    for o in members:
        title = f"{o.name}{o.signature}" if o.kind in ("function", "method") else o.name
        if o is members[0] and o.kind != "topic":
            title = f"{title} ({o.kind})"
        parts.append(f"{title}\n{'=' * min(len(title), 60)}" + (f"\n{o.doc}" if o.doc else ""))
    return "\n\n".join(parts)


def _as_markdown(members: Sequence[PyObject]) -> str:
    """Markdown: a heading per object and its first line as code."""
    parts = []
    for o in members:
        mark = "#" if o is members[0] else "##"
        code = "" if o.kind in ("module", "topic") else f"\n```python\n{_line(o)}\n```"
        parts.append(f"{mark} {o.name}{code}" + (f"\n{o.doc}" if o.doc else ""))
    return "\n\n".join(parts)
