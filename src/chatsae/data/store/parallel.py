"""Tokenisation in several processes, with results in the order of the input."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from chatsae.batch import Dialogue, Document
from chatsae.data.render import Tokenised, tokenise
from chatsae.errors import UserError

T = TypeVar("T")

_ALONE = 20  # chunks this process does first: a small corpus is done before a second process has started
_tokenizer: PreTrainedTokenizerBase | None = None  # of a worker process


def tokenised(
    chunks: Iterator[T],
    items: Callable[[T], Sequence[Dialogue | Document]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    workers: int = 0,
    alone: int = _ALONE,
) -> Generator[tuple[T, list[Tokenised]]]:
    """Each chunk with its tokens, in order; `workers` processes, 0 for one per core, 1 for this process only.

    No more than two chunks per process are in memory.

    Raises:
        UserError: a process died, for want of memory most likely.
    """
    workers = workers or os.cpu_count() or 1
    for chunk in chunks if workers == 1 else islice(chunks, alone):
        yield chunk, tokenise(items(chunk), tokenizer)
    first = next(chunks, None)
    if first is None:
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the tokenizer's threads in an unknown state
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer,)) as pool:
        running: deque[tuple[T, Future[list[Tokenised]]]] = deque([(first, pool.submit(_work, items(first)))])
        try:
            while running:
                running.extend((c, pool.submit(_work, items(c))) for c in islice(chunks, 2 * workers - len(running)))
                chunk, result = running.popleft()
                yield chunk, result.result()
        except BrokenProcessPool:
            raise UserError(
                "a process that tokenises died, perhaps for want of memory; the same command goes on where it "
                "stopped (data.workers 1 uses one process)"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer: PreTrainedTokenizerBase) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(items: Sequence[Dialogue | Document]) -> list[Tokenised]:
    assert _tokenizer is not None
    return tokenise(items, _tokenizer)
