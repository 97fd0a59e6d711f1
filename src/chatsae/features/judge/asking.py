"""Ask a client for many answers at once, each at most once; what is spent is counted and can be limited."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from chatsae.errors import UserError
from chatsae.features.judge.cache import Cache
from chatsae.features.judge.client import Answer, Client, NotRecordedError, Request

T = TypeVar("T")
R = TypeVar("R")


class Unreadable(ValueError):  # noqa: N818 - it is an answer, not an error of ours
    """Why an answer is not of the form that was asked for."""


class BudgetError(UserError):
    """The next call could cost more than is left."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Dollars per million tokens."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(slots=True)
class Usage:
    """What was asked: `calls` of a server, answers from the `cache`, tokens of the calls, and their `cost` in dollars.

    estimated: calls whose tokens the server did not tell. reasked: answers that had to be asked for again, strictly;
    refused, unreadable: those that were still none; cut: the unreadable ones that were cut off.
    """

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: int = 0
    reasked: int = 0
    refused: int = 0
    unreadable: int = 0
    cut: int = 0
    cost: float | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


class Asker:
    """A client behind a cache, under a budget in dollars."""

    def __init__(
        self,
        client: Client,
        cache: Cache | None = None,
        *,
        prices: Prices | None = None,
        budget: float | None = None,
        concurrency: int = 1,
    ) -> None:
        if budget is not None and prices is None:
            raise UserError("--budget needs --price-in and --price-out, in dollars per million tokens")
        self.client, self.cache, self.prices, self.budget = client, cache, prices, budget
        self.usage = Usage(cost=None if prices is None else 0.0)
        self._concurrency = concurrency
        self._pool: ThreadPoolExecutor | None = None
        self._reserved = 0.0
        self._dearer = 1.0  # the most that a call cost, as a multiple of its estimate
        self._lock = threading.Lock()

    def ask(self, request: Request) -> Answer:
        """The answer from the cache, else from the client.

        Raises:
            BudgetError: the call could cost more than is left.
            UserError: the client has no answer.
        """
        if self.cache is not None and (known := self.cache.get(request.key(self.client.model))) is not None:
            with self._lock:
                self.usage.cached += 1
            return known
        reserved = self._reserve(request)
        try:
            answer = self.client.complete(request)
            if self.cache is not None:
                self.cache.put(self.client.model, request, answer)
        except BaseException:
            with self._lock:
                self._reserved -= reserved
            raise
        self._spend(request, answer, reserved)
        return answer

    def read(
        self, request: Request, parse: Callable[[Answer], T], reminder: str
    ) -> tuple[T | None, str | None, Answer]:
        """What an answer says, or the reason why it says nothing; a refusal or a broken form is asked for once more."""
        value, reason, answer = self._parsed(request, parse)
        if reason is not None:
            with self._lock:
                self.usage.reasked += 1
            with suppress(NotRecordedError):  # a record of when the first answer was still taken for a verdict
                value, reason, answer = self._parsed(request.strictly(reminder), parse)
        if reason is not None:
            with self._lock:
                self.usage.refused += answer.refusal is not None
                self.usage.unreadable += answer.refusal is None
                self.usage.cut += answer.refusal is None and answer.cut
        return value, reason, answer

    def _parsed(self, request: Request, parse: Callable[[Answer], T]) -> tuple[T | None, str | None, Answer]:
        answer = self.ask(request)
        if answer.refusal is not None:
            return None, f"refused: {answer.refusal}", answer
        if request.limit is not None and (answer.completion_tokens or 0) >= request.limit:
            answer = replace(answer, finish_reason="length")  # servers that do not tell, or always say "stop"
        try:
            return parse(answer), None, answer
        except Unreadable as problem:
            return None, f"unreadable: {problem}", answer

    def each(self, work: Callable[[R], T], items: Iterable[R]) -> Iterator[T]:
        """The results of work that asks, in order of the items; the first error ends it.

        Calls that are under way then come to their end, and their answers are kept.
        """
        if self._concurrency == 1:
            yield from map(work, items)
            return
        pool = self._pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="judge")
        waiting: deque[Future[T]] = deque()
        errors: list[BaseException] = []
        try:
            for item in items:
                waiting.append(pool.submit(self._run, work, item, errors))
                if len(waiting) >= 2 * self._concurrency:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException as error:  # noqa: BLE001 - it is raised, or the one that came before it
            first = errors[0] if errors else error
            if not isinstance(first, BudgetError):
                self.client.stop()
            raise first from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, work: Callable[[R], T], item: R, errors: list[BaseException]) -> T:
        try:
            return work(item)
        except BaseException as error:
            errors.append(error)
            if not isinstance(error, BudgetError):
                self.client.stop()  # the others wait in vain
            raise

    def close(self) -> None:
        """Wait for what is under way, then close the client and the cache."""
        self.client.stop()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self.client.close()
        if self.cache is not None:
            self.cache.close()

    def _reserve(self, request: Request) -> float:
        if self.prices is None:
            return 0.0
        with self._lock:
            most = self._dearer * self.prices.cost(request.prompt_tokens, request.answer_tokens)
            spent = self.usage.cost or 0.0
            if self.budget is not None and spent + self._reserved + most > self.budget:
                raise BudgetError(
                    f"the budget of ${self.budget:,.4f} ends here: ${spent:,.4f} spent on "
                    f"{self.usage.calls:,} calls, the next could cost ${most:,.4f}; every answer is kept, "
                    "and the same command with a larger --budget goes on"
                )
            self._reserved += most
        return most

    def _spend(self, request: Request, answer: Answer, reserved: float) -> None:
        told = answer.prompt_tokens is not None and answer.completion_tokens is not None
        prompt = answer.prompt_tokens if answer.prompt_tokens is not None else request.prompt_tokens
        completion = answer.completion_tokens if answer.completion_tokens is not None else len(answer.text) // 3
        with self._lock:
            self._reserved -= reserved
            self.usage.calls += 1
            self.usage.estimated += not told
            self.usage.prompt_tokens += prompt
            self.usage.completion_tokens += completion
            if self.prices is not None:
                cost = self.prices.cost(prompt, completion)
                self.usage.cost = (self.usage.cost or 0.0) + cost
                if estimated := self.prices.cost(request.prompt_tokens, request.answer_tokens):
                    self._dearer = max(self._dearer, cost / estimated)


@dataclass(slots=True)
class Estimate:
    """What requests would cost: how many are to be sent, and how many are answered already."""

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def estimate(requests: Iterable[Request], model: str, cache: Cache | None, prices: Prices | None) -> Estimate:
    """Count requests without sending one: tokens by `Request.prompt_tokens`, answers as long as they may be."""
    found, seen = Estimate(), set()
    for request in requests:
        key = request.key(model)
        if key in seen or (cache is not None and cache.get(key) is not None):
            found.cached += 1
            continue
        seen.add(key)
        found.calls += 1
        found.prompt_tokens += request.prompt_tokens
        found.completion_tokens += request.answer_tokens
    if prices is not None:
        found.cost = prices.cost(found.prompt_tokens, found.completion_tokens)
    return found
