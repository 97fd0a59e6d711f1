"""What every call into transformers needs: silence, and its errors in a line."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from transformers.utils import logging as hf_logging

# What transformers raises for broken files, unknown architectures and configurations that do not hold together.
LOAD_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError, ArithmeticError),
    *(AssertionError, MemoryError, SafetensorError, hub_errors.StrictDataclassError),
)


@contextmanager
def quiet(*, downloads: bool = False) -> Iterator[None]:
    """Hold back transformers' load reports, advice and progress bars; errors still come through.

    `downloads` lets the bars stand: a download of gigabytes must show that it moves.
    """
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if not downloads:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """The first line of an exception's text, and the second where the first announces it, for a message of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
