"""The rows of several sources in one order that can be repeated and taken up again."""

import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from chatsae.data.readers import Row
from chatsae.data.sources import Source
from chatsae.typed import convert

Order = Literal["mixed", "listed"]
_OPEN = 8  # parts of a source that are read side by side


class Found(NamedTuple):
    """A row, and the index of its source."""

    source: int
    row: Row


class RowStream(Iterator[Found]):
    """Every row of the sources once.

    listed: source after source, part after part. mixed: each next row comes from a source drawn in proportion to its
    rows, and there from one of at most eight open parts, so that any beginning of the stream is a sample of the whole.
    The order depends on `seed` and on nothing else; `state_dict` and `state` take it up at the same row.
    """

    def __init__(self, sources: Sequence[Source], *, order: Order, seed: int, state: dict[str, Any] | None = None):
        convert(order, Order, "data.order")
        self.sources = tuple(sources)
        self._random = random.Random(f"rows/{seed}")
        self._lanes = [_Lane(source, order, f"{seed}/{index}") for index, source in enumerate(self.sources)]
        self._weights = _weights(self.sources)
        self._mixed = order == "mixed"
        if state is not None:
            version, internal, gauss = state["random"]
            self._random.setstate((version, tuple(internal), gauss))
            for lane, saved in zip(self._lanes, state["lanes"], strict=True):
                lane.load(saved)
        self._live = [index for index, lane in enumerate(self._lanes) if lane.open or lane.waiting]

    def __next__(self) -> Found:
        while self._live:
            index = self._draw()
            row = self._lanes[index].next(self._random)
            if row is not None:
                return Found(index, row)
            self._live.remove(index)
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON can hold it."""
        return {"random": self._random.getstate(), "lanes": [lane.state_dict() for lane in self._lanes]}

    def _draw(self) -> int:
        if not self._mixed or len(self._live) == 1:
            return self._live[0]
        return self._random.choices(self._live, [self._weights[i] for i in self._live])[0]


class _Lane:
    """The parts of one source, some of them open."""

    def __init__(self, source: Source, order: Order, seed: str) -> None:
        self._source = source
        self.waiting = list(range(len(source.parts)))
        if order == "mixed":
            random.Random(f"parts/{seed}").shuffle(self.waiting)
        self._limit = _OPEN if order == "mixed" else 1
        self._rows: dict[int, Iterator[Row]] = {}
        self.open: dict[int, int] = {}  # part -> rows read of it

    def next(self, rng: random.Random) -> Row | None:
        while True:
            while self.waiting and len(self.open) < self._limit:
                self.open[self.waiting.pop(0)] = 0
            if not self.open:
                return None
            parts = list(self.open)
            part = parts[0] if len(parts) == 1 else rng.choice(parts)
            if part not in self._rows:
                self._rows[part] = self._source.parts[part].rows(self.open[part])
            row = next(self._rows[part], None)
            if row is not None:
                self.open[part] += 1
                return row
            del self._rows[part], self.open[part]

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": list(self.waiting), "open": [[part, n] for part, n in self.open.items()]}

    def load(self, state: dict[str, Any]) -> None:
        self.waiting = list(state["waiting"])
        self.open = dict(state["open"])


def _weights(sources: Sequence[Source]) -> list[float]:
    """Rows of each source; where they are not known, as many as the others have on average."""
    known = [source.rows for source in sources if source.rows]
    mean = sum(known) / len(known) if known else 1.0
    return [float(source.rows or mean) for source in sources]
