"""What the documentation answers: one function per question, None where an object's documentation has no answer."""

import functools
import random
import re
from collections.abc import Callable

from chatsae.data.pydocs.library import Parameter, PyObject

LONGEST = 3600  # characters of documentation in one answer: about 1,100 tokens of the bundled tokenizer

Answer = Callable[[PyObject, random.Random], str | None]

_PROSE = re.compile(r"^(?!>>>|\.\. |[-*+=~^#|]{2,}|[-*+] |\d+[.)] )\S.*(?:\n\S.*)*$")
_SENTENCE_END = re.compile(r"(?<=[a-z0-9_)\]'\"`][.!?])\s+(?=[A-Z\"'`*(])")


def paragraphs(text: str) -> list[str]:
    """The parts of a text between blank lines."""
    return [p.strip("\n") for p in re.split(r"\n\s*\n", text) if p.strip()]


@functools.lru_cache(maxsize=1 << 15)
def sentences(text: str) -> tuple[str, ...]:
    """The sentences of the prose paragraphs; lists, code and tables are left out."""
    prose = (p for p in paragraphs(text) if _PROSE.match(p))
    return tuple(s for p in prose for s in _SENTENCE_END.split(" ".join(p.split())))


def summary(o: PyObject) -> str:
    """The first sentence, or else the first line."""
    first = next(iter(sentences(o.doc)), "")
    return first if first and o.doc.split()[0] == first.split()[0] else o.doc.splitlines()[0].strip()


def head(text: str, limit: int) -> str:
    """Whole paragraphs from the start, at least one, up to `limit` characters; a longer first one is cut at a line."""
    kept = ""
    for p in paragraphs(text):
        if kept and len(kept) + len(p) + 2 > limit:
            break
        kept = f"{kept}\n\n{p}" if kept else p
    return kept if len(kept) <= limit else kept[:limit].rpartition("\n")[0].rstrip() or kept[:limit].rpartition(" ")[0]


def what(o: PyObject, rng: random.Random) -> str | None:
    return head(o.doc, rng.choice((200, 500, 1000)))


def full(o: PyObject, rng: random.Random) -> str | None:
    return head(o.doc, LONGEST)


def summarised(o: PyObject, rng: random.Random) -> str | None:
    return summary(o)


def first_line(o: PyObject, rng: random.Random) -> str | None:
    line = o.doc.splitlines()[0].strip()
    return rng.choice((line, line, f'It begins with "{line}"'))


def more(o: PyObject, rng: random.Random) -> str | None:
    rest = paragraphs(o.doc)[1:]
    return head("\n\n".join(rest), rng.choice((400, 1000, 2400))) if rest else None


def call(o: PyObject) -> str:
    """An object as one calls it."""
    return f"{o.name if o.kind != 'method' else o.short}{o.signature}"


def signature(o: PyObject, rng: random.Random) -> str | None:
    if not o.signature:
        return None
    return rng.choice((call(o), f"```python\n{call(o)}\n```", f"The signature is `{call(o)}`."))


def parameters(o: PyObject, rng: random.Random) -> str | None:
    if not o.signature or o.flavour == "property":
        return None
    names = [p.name for p in o.parameters]
    if not names:
        return "It has no named parameters." if "*" in o.signature else "It has no parameters."
    if rng.random() < 0.4:
        return "\n".join(f"- {n}" for n in names)
    return f"{_and(names)}." if len(names) > 1 else f"Only {names[0]}."


def count(o: PyObject, rng: random.Random) -> str | None:
    if not o.signature or o.flavour == "property" or "*" in o.signature.replace("*, ", ""):
        return None
    n = len(o.parameters)
    if n == 0:
        return "None."
    return f"One: {o.parameters[0].name}." if n == 1 else f"{_number(n)}: {_and([p.name for p in o.parameters])}."


@functools.lru_cache(maxsize=1 << 15)
def about_parameter(o: PyObject, p: Parameter) -> str | None:
    """What the documentation says about a parameter: its entry in a list, or a sentence that marks it or names it."""
    entry = re.search(
        rf"^ *[*`'\"-]*{re.escape(p.name)}[*`'\"]*(?: ?\([^)]*\))? *(?:--?|:|=) +(\S.{{8,}})$", o.doc, re.M
    )
    if entry:
        return " ".join(entry[1].split())
    marked = re.compile(rf"[*`'\"]{re.escape(p.name)}[*`'\"]")
    plain = re.compile(rf"(?<![\w.]){re.escape(p.name)}(?![\w(.]\w)")
    said = sentences(o.doc)
    found = next((s for s in said if marked.search(s)), None)
    if not found and ("_" in p.name or len(p.name) >= 5):
        found = next((s for s in said if plain.search(s)), None)
    return found


def module(o: PyObject, rng: random.Random) -> str | None:
    if o.kind in ("module", "topic"):
        return None
    return rng.choice((f"In the module {o.module}.", f"{o.module}", f"{o.short} is defined in the module {o.module}."))


def imported(o: PyObject, rng: random.Random) -> str | None:
    if o.kind == "module":
        line = f"import {o.name}"
    elif o.kind in ("class", "function") and o.owner == o.module:
        line = f"from {o.module} import {o.short}"
    else:
        return None
    return rng.choice((line, f"```python\n{line}\n```"))


def kind(o: PyObject, rng: random.Random) -> str | None:
    if o.kind == "topic":
        return None
    noun = {"async": "a coroutine", "property": "a property"}.get(o.flavour, f"a {o.flavour or o.kind}")
    of = f" of the class {o.owner.rpartition('.')[2]}" if o.kind == "method" else ""
    return rng.choice((f"It is {noun}{of}.", f"{o.short} is {noun}{of}.", f"{noun[0].upper()}{noun[1:]}{of}."))


def _saying(pattern: str) -> Answer:
    """The first sentence with a pattern, for what can be called."""
    search = re.compile(pattern)

    def answer(o: PyObject, rng: random.Random) -> str | None:
        if o.kind not in ("function", "method") or o.flavour == "property":
            return None
        return next((s for s in sentences(o.doc) if search.search(s)), None)

    return answer


def example(o: PyObject, rng: random.Random) -> str | None:
    found = [p for p in paragraphs(o.doc) if p.lstrip().startswith(">>>")]
    if not found:
        return None
    lines = head("\n\n".join(found), rng.choice((200, 600))).splitlines()
    margin = min(len(line) - len(line.lstrip()) for line in lines if line)
    code = "\n".join(line[margin:] for line in lines)
    return rng.choice((code, f"```python\n{code}\n```"))


def bases(o: PyObject, rng: random.Random) -> str | None:
    if o.kind != "class":
        return None
    return (
        f"It inherits from {_and(list(o.bases))}." if o.bases else "It names no base class, so it inherits from object."
    )


def owner(o: PyObject, rng: random.Random) -> str | None:
    if o.kind != "method":
        return None
    return rng.choice((f"It belongs to the class {o.owner}.", f"{o.owner}", f"The class {o.owner.rpartition('.')[2]}."))


ANSWERS: dict[str, Answer] = {
    "what": what,
    "full": full,
    "summary": summarised,
    "first_line": first_line,
    "more": more,
    "signature": signature,
    "parameters": parameters,
    "count": count,
    "module": module,
    "import": imported,
    "kind": kind,
    "returns": _saying(r"\b[Rr]eturn(?:s|ed|ing)?\b|\b[Yy]ields?\b"),
    "raises": _saying(r"\b[Rr]aise[sd]?\b|\b\w+Error\b|\bexception\b"),
    "example": example,
    "bases": bases,
    "owner": owner,
}


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def _number(n: int) -> str:
    return (
        ("None", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")[n]
        if n <= 10
        else str(n)
    )
