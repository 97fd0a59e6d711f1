"""The one thread that uses the model: it answers many requests at once, and does other work between two steps."""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from chatsae import console
from chatsae.errors import UserError
from chatsae.lm.load import LanguageModel
from chatsae.serve.answer import Answer
from chatsae.serve.errors import ApiError
from chatsae.serve.rows import Rows
from chatsae.serve.sampling import Dice

_WORK_SECONDS = 0.05  # of other work between two steps, begun


def stopping() -> ApiError:
    """What is told to those that come, or are not done, when the server goes."""
    return ApiError(503, "the server is stopping", code="server_shutdown", headers={"Connection": "close"})


class Engine:
    """Answers requests in the order in which they come, at most `most` at once; new ones join those under way."""

    def __init__(self, lm: LanguageModel, margin: float | None, *, most: int = 64, gather: float = 0.003) -> None:
        """`gather`: seconds to wait for more requests where none is under way."""
        self.rows = Rows(lm.with_head(), margin)
        self._most, self._gather = most, gather
        self._ends = self.rows.full.stop_ids
        self._waiting: deque[Answer] = deque()
        self._work: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def counts(self) -> dict[str, int]:
        """How many answers are under way, and how many wait."""
        return {"running": len(self.rows.answers), "waiting": len(self._waiting)}

    def submit(self, answer: Answer) -> None:
        """Answer a request; its events go to its sink, in the engine's thread."""
        with self._changed:
            if self._deadline is not None:
                answer.fail(stopping())
                return
            self._waiting.append(answer)
            self._changed.notify()

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run something that needs the model, between two steps."""
        future: Future[Any] = Future()
        with self._changed:
            if self._deadline is not None:
                future.set_exception(stopping())
                return future
            self._work.append((function, future))
            self._changed.notify()
        return future

    def drain(self, seconds: float) -> None:
        """Take nothing more; what is not answered after this time ends with an error."""
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify()

    def join(self) -> None:
        """Wait until all is answered or given up."""
        self._thread.join()

    def _run(self) -> None:
        while self._wait():
            self._do_work()
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - one broken forward must not end the server
                self._give_up(self.rows.answers, error)
                self.rows.clear()
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._end_all()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False: it is time to go."""
        with self._changed:
            while not (self._waiting or self._work or self.rows.answers):
                if self._deadline is not None:
                    return False
                self._changed.wait()
        if not self.rows.answers and self._waiting:
            time.sleep(self._gather)
        return True

    def _turn(self) -> None:
        """One forward for the answers under way, and one for those that join them."""
        for answer in self.rows.answers:
            answer.over = answer.over or answer.cancelled
        self.rows.leave()
        self._tell(self.rows.step())
        joining = self._next()
        if joining:
            self._join(joining)
        self.rows.leave()

    def _join(self, joining: list[Answer]) -> None:
        """Those under way go on where it fails; of several, each is tried by itself."""
        try:
            self._tell(self.rows.join(joining))
        except Exception as error:  # noqa: BLE001 - of any kind
            if len(joining) == 1:
                self._give_up(joining, error)
                return
            for answer in joining:
                answer.dice = Dice(answer.sampling)
                self._join([answer])

    def _next(self) -> list[Answer]:
        room = self._most - len(self.rows.answers)
        with self._changed:
            there = [answer for answer in self._waiting if not answer.cancelled]
            joining = there[: self.rows.fit(there, room)] if room > 0 else []
            self._waiting = deque(there[len(joining) :])
        return joining

    def _tell(self, tokens: list[tuple[Answer, int]]) -> None:
        for answer, token in tokens:
            if not answer.over and token >= 0:
                answer.take(token, self._ends)

    def _do_work(self) -> None:
        start = time.monotonic()
        while self._work and time.monotonic() - start < _WORK_SECONDS:
            function, future = self._work.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - whoever asked is told
                future.set_exception(error)

    def _give_up(self, answers: list[Answer], error: Exception) -> None:
        """Tell what failed; the reason goes to the log where it is not for the client."""
        line = " ".join(str(error).split())[:500]
        full = isinstance(error, torch.OutOfMemoryError)
        if isinstance(error, UserError):
            told = ApiError(400, line, param="steering")
        elif full:
            told = ApiError(503, "out of memory; ask again later", code="out_of_memory", headers={"Retry-After": "5"})
        else:
            told = ApiError(500, "the model failed on this request; the server's log says more")
        console.warn(f"{len(answers)} answers given up: {type(error).__name__}: {line}")
        for answer in answers:
            answer.fail(told)
        if full and self.rows.full.device.type == "cuda":
            torch.cuda.empty_cache()

    def _end_all(self) -> None:
        with self._changed:
            left, self._waiting = [*self.rows.answers, *self._waiting], deque()
            work, self._work = list(self._work), deque()
        self.rows.clear()
        for answer in left:
            answer.fail(stopping())
        for _, future in work:
            if future.set_running_or_notify_cancel():
                future.set_exception(stopping())
