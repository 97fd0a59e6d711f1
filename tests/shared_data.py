"""Where the real tokenizers and dialogues lie, for the tests that use them when they are present."""

import os
from pathlib import Path

import pytest


def shared_data(*parts: str) -> Path:
    """A path under the shared data directory (CHATSAE_SHARED_DATA, or ../shared/data); skips the test without it."""
    root = Path(os.environ.get("CHATSAE_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} of the shared data (set CHATSAE_SHARED_DATA to its directory)")
    return path
