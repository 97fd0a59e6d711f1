"""Shape annotations are checked while the tests run; on the command line they cost nothing."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: more threads only wait for each other

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
