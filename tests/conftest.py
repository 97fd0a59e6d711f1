"""What holds for all tests: no network, one thread, no clock, and shape annotations that are checked."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: more threads only wait for each other

from collections.abc import Iterator
from pathlib import Path

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


_SLOW = {
    *("audit_model", "bad_input", "bench", "buffer", "dedup", "demo", "docs", "evals_pass", "export"),
    *("features", "hashing", "judge", "judge_controls", "judge_tasks", "lm_packed", "lm_stacks", "models_table"),
    *("page_browser", "page_kinds", "page_tables", "patterns", "plan", "portable", "prepare", "pydocs", "render"),
    *("sae_pairs", "sae_step_numba", "sae_step_triton", "serve", "serve_clients", "spark", "steering"),
    *("steering_export", "steering_strength", "steering_sweep", "synthetic", "tiny_chat", "training"),
    *("training_gsnr", "training_prepared"),
}
"""Test files that `make test-quick` leaves out: three quarters of the time of all, by --durations."""


def _slow(path: Path) -> bool:
    return path.suffix == ".py" and path.stem.removeprefix("test_") in _SLOW


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where the slow tests are left out, import none of their files."""
    return True if config.option.markexpr == "not slow" and _slow(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files."""
    for item in items:
        if _slow(item.path):
            item.add_marker("slow")
