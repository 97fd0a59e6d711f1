"""Trying work that may never end, or takes all memory, in a child process with limits."""

import os
import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

_SECONDS = 2  # of processor time, so that a busy machine changes nothing
_MEMORY = 1 << 30  # bytes more than this process has


def problem_of(work: Callable[[], object]) -> str | None:
    """What keeps `work` from ending within 2 seconds of processor time and 1 GiB of memory; None: nothing.

    It runs in a copy of this process. An exception that it raises is no problem: it has ended.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: the child starts no thread and no kernel
        child = os.fork()
    if child == 0:
        _run(work)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return "it takes more than 1 GiB of memory" if os.WEXITSTATUS(status) else None
    if os.WTERMSIG(status) == signal.SIGXCPU:
        return f"it does not end within {_SECONDS} seconds of processor time"
    return f"it is stopped by signal {os.WTERMSIG(status)}"


def _run(work: Callable[[], object]) -> None:
    """Never returns."""
    code = 0
    try:
        statm = Path("/proc/self/statm")
        limits = {resource.RLIMIT_CPU: _SECONDS, resource.RLIMIT_CORE: 0}
        if statm.exists():  # elsewhere there is no limit of memory
            limits[resource.RLIMIT_AS] = int(statm.read_text().split()[0]) * resource.getpagesize() + _MEMORY
        for limit, value in limits.items():
            hard = resource.getrlimit(limit)[1]
            resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        work()
    except MemoryError:
        code = 1
    except BaseException:  # noqa: BLE001 - whoever does the work in earnest will see it
        code = 0
    finally:
        os._exit(code)
