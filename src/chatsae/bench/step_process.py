"""`chatsae bench sae-step` in an interpreter of its own that has the peers; chatsae need not be installed there.

Run as `python -I step_process.py JOB`, JOB being the fields of `chatsae.bench.step_cases.Matrix` as JSON. Prints the
conditions and rows as JSON, or the message of a user's mistake.
"""

import importlib.util
import json
import sys
from pathlib import Path


def load() -> None:
    """Make this very package importable, and nothing else that lies beside it."""
    spec = importlib.util.spec_from_file_location("chatsae", Path(__file__).parents[1] / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chatsae"] = module
    spec.loader.exec_module(module)


def main(job: str) -> None:
    load()
    from chatsae.bench.sae_step import measured
    from chatsae.bench.step_cases import Matrix
    from chatsae.errors import UserError

    try:
        answer = measured(Matrix(**json.loads(job)))
    except UserError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
