"""What holds for all tests: no network, one thread, no clock, and shape annotations that are checked."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: more threads only wait for each other

import hypothesis
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
