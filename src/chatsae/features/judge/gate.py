"""How many requests are under way at once: more while a server answers, half when it says that it is too much."""

import threading
import time


class Gate:
    """Additive increase, multiplicative decrease, between 1 and `most`; a pause that a server asks for is for all."""

    def __init__(self, most: int) -> None:
        self.limit = float(min(2, most))
        self.under_way = 0
        self.highest = 0
        self._most = float(most)
        self._slowed = 0.0
        self._until = 0.0
        self._closed = False
        self._free = threading.Condition()

    def enter(self) -> float:
        """Wait for a turn; returns the time it began.

        Raises:
            ClosedError: the gate was closed.
        """
        with self._free:
            while True:
                if self._closed:
                    raise ClosedError
                pause = self._until - time.monotonic()
                if pause <= 0 and self.under_way < int(self.limit):
                    break
                self._free.wait(pause if pause > 0 else None)
            self.under_way += 1
            self.highest = max(self.highest, self.under_way)
            return time.monotonic()

    def leave(self, entered: float, *, overloaded: bool = False, pause: float = 0.0) -> None:
        """End a turn. Several that were refused together halve the limit once."""
        with self._free:
            self.under_way -= 1
            now = time.monotonic()
            if not overloaded:
                self.limit = min(self._most, self.limit + 1 / self.limit)
            elif entered >= self._slowed:
                self.limit, self._slowed = max(1.0, self.limit / 2), now
            self._until = max(self._until, now + pause)
            self._free.notify_all()

    def sleep(self, seconds: float) -> None:
        """Wait, but not beyond the end of the gate.

        Raises:
            ClosedError: the gate was closed.
        """
        end = time.monotonic() + seconds
        with self._free:
            while not self._closed and (left := end - time.monotonic()) > 0:
                self._free.wait(left)
            if self._closed:
                raise ClosedError

    def close(self) -> None:
        """Whoever waits is sent away."""
        with self._free:
            self._closed = True
            self._free.notify_all()


class ClosedError(Exception):
    """Nobody waits for an answer any more."""
