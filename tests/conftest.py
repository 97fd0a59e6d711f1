"""What holds for all tests: no network, one thread, no clock, and shape annotations that are checked."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: more threads only wait for each other

from collections.abc import Iterator

import hypothesis
import pytest
from jaxtyping import install_import_hook

install_import_hook(
    [
        "chatsae.audit",
        "chatsae.batch",
        "chatsae.buffer",
        "chatsae.evals",
        "chatsae.features",
        "chatsae.lm",
        "chatsae.sae",
        "chatsae.serve",
        "chatsae.steering",
        "chatsae.steersweep",
    ],
    "beartype.beartype",
)

# How long an example takes depends on what else the machine does. In CI the examples are the same each time.
hypothesis.settings.register_profile(
    "chatsae", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("chatsae")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A chromium that pages are opened in; `page_browser.Opened` is one of them."""
    from page_browser import started

    with started() as chromium:
        yield chromium
