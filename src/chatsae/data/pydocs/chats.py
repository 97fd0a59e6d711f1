"""Dialogues about documented objects: questions in varied words, answers out of the documentation."""

import random
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from chatsae.batch import Message
from chatsae.data.pydocs import words
from chatsae.data.pydocs.answers import ANSWERS, about_parameter, head, paragraphs, summary
from chatsae.data.pydocs.library import PyObject

_TURNS = (1, 2, 3, 4, 5, 6)
_TURN_WEIGHTS = (26, 25, 19, 14, 9, 7)
_SYSTEM_SHARE = 0.125
_PASTED_SHARE = 0.2
_LONGEST = 5500  # characters of a dialogue: under 2,000 tokens of the bundled tokenizer
_WEIGHTS = {
    "what": 4.0,
    "full": 1.0,
    "more": 1.5,
    "meaning": 2.5,
    "methods": 1.5,
    "method": 2.0,
    "returns": 2.0,
    "raises": 2.0,
}
_FIRST_WEIGHTS = {"what": 8.0, "full": 0.8, "more": 0.0, "method": 1.0}


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The objects of one split that can be asked about, with their relatives of the same split."""

    subjects: tuple[PyObject, ...]
    children: Mapping[str, Sequence[PyObject]]
    functions: Mapping[str, Sequence[PyObject]]

    @classmethod
    def of(cls, found: Sequence[PyObject]) -> "Catalogue":
        """The documented objects, the documented methods of each class and functions of each module."""
        children, functions = defaultdict(list), defaultdict(list)
        for o in found:
            if o.kind in ("method", "class"):
                children[o.owner].append(o)
            elif o.kind == "function":
                functions[o.module].append(o)
        return cls(tuple(o for o in found if o.doc), dict(children), dict(functions))

    def dialogues_about(self, o: PyObject) -> int:
        """Dialogues per seed: more where there is more to ask."""
        return 1 + (len(o.doc) > 80) + (o.kind in ("module", "topic", "class")) + min(len(o.doc) // 1000, 12)

    def relatives(self, o: PyObject) -> list[PyObject]:
        """Documented neighbours of a method or function."""
        if o.kind == "method":
            near: Sequence[PyObject] = self.children.get(o.owner, ())
        else:
            near = self.functions.get(o.module, ()) if o.kind == "function" else ()
        return [n for n in near if n.doc and n is not o]


@dataclass(frozen=True, slots=True)
class _Turn:
    """A question in one wording, and its answer; `part` is the parameter, method or passage it asks about."""

    topic: str
    wording: str
    part: str
    answer: str

    def question(self, x: str) -> str:
        """The question with the object called `x`."""
        return self.wording.replace("{x}", x).replace("{p}", self.part)


@dataclass(frozen=True, slots=True)
class _System:
    """A system prompt (empty: none, so that the template adds its own), who it says speaks, and what it asks for."""

    prompt: str = ""
    name: str = "Tiny"
    style: str = ""


def dialogue(o: PyObject, catalogue: Catalogue, rng: random.Random) -> tuple[Message, ...]:
    """One dialogue about an object: 1 to 6 user turns, each with its answer, perhaps a system prompt before them."""
    system = _system(rng) if rng.random() < _SYSTEM_SHARE else _System()
    wanted = rng.choices(_TURNS, _TURN_WEIGHTS)[0]
    pairs = _opening(system, rng) if wanted > 1 else []
    closing = [_closing(rng)] if wanted > len(pairs) + 1 and rng.random() < 0.22 else []
    room = wanted - len(pairs) - len(closing)
    pairs += _about(o, catalogue, room, rng)
    if len(pairs) + len(closing) < wanted and (relatives := catalogue.relatives(o)):
        pairs += _about_relative(rng.choice(relatives), catalogue, wanted - len(pairs) - len(closing), rng)
    messages = [Message("system", system.prompt)] if system.prompt else []
    for question, answer in _within(pairs, _LONGEST) + closing:
        answer = textwrap.dedent(answer).strip()
        messages += [Message("user", question), Message("assistant", styled(answer, system.style, system.name))]
    return tuple(messages)


def _within(pairs: list[tuple[str, str]], limit: int) -> list[tuple[str, str]]:
    """The first pairs that together have at most `limit` characters; at least one."""
    total, kept = 0, []
    for question, answer in pairs:
        total += len(question) + len(answer)
        if kept and total > limit:
            break
        kept.append((question, answer))
    return kept


def styled(answer: str, style: str, name: str) -> str:
    """An answer as a system prompt asks for it."""
    lines = [line.rstrip() for line in answer.splitlines()]
    match style:
        case "one_line":
            first = paragraphs(answer.replace("```python\n", "").replace("\n```", ""))[0]
            return " ".join(first.removeprefix("- ").replace("\n- ", ", ").split())
        case "upper":
            return answer.upper()
        case "bullet":
            return "\n".join(f"- {line.lstrip('- ')}" for line in lines if line.lstrip("- "))
        case "quote":
            return "\n".join(f"> {line}".rstrip() for line in lines)
        case "signed":
            return f"{answer}\n{name}"
        case "polite":
            return f"With pleasure. {answer}" if len(lines) == 1 else f"With pleasure.\n\n{answer}"
        case _:
            return answer


def _system(rng: random.Random) -> _System:
    name = rng.choice(words.NAMES)
    form = rng.random()
    if form < 0.25:
        return _System(rng.choice(words.PLAIN_SYSTEM), "Tiny")
    persona = rng.choice(words.PERSONAS).format(name=name, version=f"3.{sys.version_info.minor}")
    if form < 0.5:
        return _System(persona, name)
    style = rng.choice(("one_line", "one_line", *words.STYLES))
    wish = rng.choice(words.STYLES[style]).format(name=name)
    if style == "signed" or rng.random() < 0.3:
        return _System(f"{persona} {wish}", name, style)
    return _System(wish, "Tiny", style)


def _opening(system: _System, rng: random.Random) -> list[tuple[str, str]]:
    """Small talk before the first question, in some dialogues."""
    draw = rng.random()
    if draw < 0.12:
        question, answers = rng.choice(words.GREETINGS)
        return [(question, rng.choice(answers))]
    if draw < 0.16:
        return [(rng.choice(words.WHO), rng.choice((f"I am {system.name}.", f"My name is {system.name}.")))]
    return []


def _closing(rng: random.Random) -> tuple[str, str]:
    question, answers = rng.choice(words.THANKS)
    return question, rng.choice(answers)


def _about(o: PyObject, catalogue: Catalogue, room: int, rng: random.Random) -> list[tuple[str, str]]:
    """Up to `room` different questions about an object; in the first it is named, or its docstring is pasted."""
    turns = _turns(o, catalogue, rng)
    chosen = _draw(turns, room, rng)
    pairs: list[tuple[str, str]] = []
    for i, turn in enumerate(chosen):
        if i > 0:
            unclear = chosen[i - 1].topic == "method"  # "it" would be the method
            it = o.short if unclear else rng.choice((*words.IT[o.kind], o.short))
            pairs.append((_lead(turn.question(it), rng), turn.answer))
        elif (
            turn.topic not in ("full", "more", "method", "functions", "goes_on")
            and len(o.doc) < 1500
            and rng.random() < _PASTED_SHARE
        ):
            pairs.append((_pasted(o, turn, rng), turn.answer))
        else:
            pairs.append((turn.question(_named(o, rng)), turn.answer))
    return pairs


def _about_relative(o: PyObject, catalogue: Catalogue, room: int, rng: random.Random) -> list[tuple[str, str]]:
    question = rng.choice(words.NEXT_OBJECT).format(x=rng.choice((o.short, o.name)))
    return [(question, summary(o)), *_about(o, catalogue, room - 1, rng)][:room]


def _draw(turns: Sequence[_Turn], room: int, rng: random.Random) -> list[_Turn]:
    """Turns without repetition, by weight; what only a follow-up can ask is never first."""
    left, chosen = list(turns), []
    while left and len(chosen) < room:
        special = _WEIGHTS if chosen else {**_WEIGHTS, **_FIRST_WEIGHTS}
        weights = [special.get(t.topic, 1.0) * _bonus(t) for t in left]
        turn = rng.choices(left, weights if sum(weights) else None)[0]
        chosen.append(turn)
        left = [t for t in left if t is not turn and (t.topic != turn.topic or t.topic in ("meaning", "method"))]
    return chosen


def _bonus(turn: _Turn) -> float:
    """Long answers are rare in the documentation; they are asked for more often, which gives the lengths their tail."""
    return 1.0 + min(len(turn.answer), 3000) / 500 if turn.topic in ("full", "more", "goes_on") else 1.0


def _turns(o: PyObject, catalogue: Catalogue, rng: random.Random) -> list[_Turn]:
    """Every question that the documentation of an object answers, in one wording each."""
    answered = [(topic, "", answer(o, rng)) for topic, answer in ANSWERS.items()]
    answered += [("meaning", p.name, about_parameter(o, p)) for p in o.parameters]
    defaults = [p for p in o.parameters if p.name not in ("args", "kwargs")]
    if defaults:
        p = rng.choice(defaults)
        answered.append(
            (
                "default",
                p.name,
                f"The default is {p.default}." if p.default else "It has no default, so it must be given.",
            )
        )
    answered += _members(o, catalogue, rng) + _passages(o, rng)
    return [
        _Turn(topic, rng.choice(words.QUESTIONS[topic]), part, answer) for topic, part, answer in answered if answer
    ]


def _members(o: PyObject, catalogue: Catalogue, rng: random.Random) -> list[tuple[str, str, str]]:
    """What can be asked about the methods of a class or the functions of a module."""
    if o.kind == "module" and (functions := [f.short for f in catalogue.functions.get(o.name, ())]):
        some = sorted(rng.sample(functions, min(len(functions), rng.choice((3, 5, 8)))))
        return [("functions", "", "\n".join(f"- {n}" for n in some))]
    methods = [m for m in catalogue.children.get(o.name, ()) if m.kind == "method"] if o.kind == "class" else []
    if not methods:
        return []
    documented = [m for m in methods if m.doc]
    told = rng.sample(documented, min(len(documented), 3))
    listed = ("methods", "", "\n".join(f"- {m.short}" for m in methods))
    return [listed, *(("method", m.short, head(m.doc, 300)) for m in told)]


def _passages(o: PyObject, rng: random.Random) -> list[tuple[str, str, str]]:
    """What follows a paragraph of a long text."""
    parts = paragraphs(o.doc)
    if len(parts) < 4:
        return []
    i = rng.randrange(len(parts) - 1)
    line = parts[i].splitlines()[0].strip()
    return [("goes_on", line, head("\n\n".join(parts[i + 1 :]), rng.choice((300, 800, 1600, 2800))))]


def _named(o: PyObject, rng: random.Random) -> str:
    """An object's name as people write it."""
    forms: list[Callable[[], str]] = [lambda: o.name, lambda: o.name, lambda: f"`{o.name}`"]
    if o.kind == "module":
        forms.append(lambda: f"the module {o.name}")
    elif o.kind == "topic":
        forms = [
            lambda: f'the topic "{o.short}"',
            lambda: f"{o.short} in Python",
            lambda: f"the Python topic {o.short}",
        ]
    else:
        forms += [
            lambda: f"{o.short} from {o.owner}",
            lambda: f"the {o.kind} {o.name}",
            lambda: f"{o.short} in {o.owner}",
        ]
    return rng.choice(forms)()


def _pasted(o: PyObject, turn: _Turn, rng: random.Random) -> str:
    """The question with the object's signature and docstring pasted into it."""
    doc = o.doc if o.kind in ("module", "topic") else f"{o.name}{o.signature}\n{o.doc}"
    question = turn.question(rng.choice(words.IT[o.kind][2:]))
    return rng.choice(words.PASTED).replace("{question}", question).replace("{doc}", doc)


def _lead(question: str, rng: random.Random) -> str:
    """A question as a follow-up, with or without a word before it."""
    lead = rng.choice(words.LEAD_INS)
    if lead in ("And ", "One more thing: ") and question.split()[0].isalpha() and not question.startswith("I "):
        question = question[0].lower() + question[1:]
    return lead + question
