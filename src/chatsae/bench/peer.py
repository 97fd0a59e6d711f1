"""The process that runs `sae_lens_peer.py`, and the interpreter to run it with."""

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatsae.errors import UserError

HOW = "no interpreter with sae_lens: `make parity` sets one up in .venv-parity, --peer PATH names another"
_SCRIPT = Path(__file__).with_name("sae_lens_peer.py")
_BESIDE = Path(__file__).parents[3] / ".venv-parity" / "bin" / "python"


def find_interpreter(asked: Path | None) -> Path | None:
    """The interpreter asked for, or that of `make parity` beside the sources; None where there is none.

    Raises:
        UserError: the one asked for is no Python, or has no sae_lens.
    """
    return chosen_interpreter(asked, _BESIDE, "sae_lens", _problem)


def chosen_interpreter(
    asked: Path | None, beside: Path, what: str, problem_of: Callable[[Path], str | None]
) -> Path | None:
    """The interpreter asked for, or the one beside the sources; None where that is missing or has a problem.

    Raises:
        UserError: the one asked for is no file, or has a problem; `what` is what it should have.
    """
    if asked is None:
        return beside if beside.is_file() and problem_of(beside) is None else None
    if not asked.is_file():
        raise UserError(f"peer: {asked} is no file; a Python interpreter that has {what} is expected")
    problem = problem_of(asked)
    if problem is not None:
        raise UserError(f"peer: {asked} is no Python interpreter that has {what}: {problem}")
    return asked


def answer(python: Path, code: str) -> tuple[str, str | None]:
    """What an interpreter prints for a line of code, and why it does not."""
    try:
        done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    if done.returncode:
        return "", (done.stderr.strip() or f"it ended with code {done.returncode}").splitlines()[-1]
    return done.stdout.strip(), None


def _problem(python: Path) -> str | None:
    """Why this is no interpreter with sae_lens."""
    printed, problem = answer(python, "from importlib.metadata import version; print(version('sae-lens'))")
    return problem or (None if printed else "it prints no version")


class Peer:
    """sae_lens on a checkpoint and on named rows of token ids; a context that ends its process.

    Attributes: versions, first (the activations of the first batch of rows by name, padding removed).
    """

    def __init__(self, python: Path, scratch: Path, rows: Mapping[str, Int[Tensor, "R T"]], job: Mapping[str, Any]):
        """Start it and wait until its model is loaded.

        Raises:
            UserError: it failed.
        """
        files = {name: str(scratch / f"rows-{i}.safetensors") for i, name in enumerate(rows)}
        for name, file in files.items():
            save_file({"tokens": rows[name].contiguous()}, file)
        sample, written = scratch / "sample.safetensors", scratch / "job.json"
        whole = {**job, "threads": torch.get_num_threads(), "rows": files, "sample": str(sample)}
        written.write_text(json.dumps(whole), encoding="utf-8")
        self._errors = (scratch / "peer.log").open("w+", encoding="utf-8")
        command = [str(python), "-I", str(_SCRIPT), str(written)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        try:
            self.versions: dict[str, str] = self._answer()
            self.first: dict[str, Float[Tensor, "N D"]] = load_file(sample)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str, batches: int) -> dict[str, Any]:
        """Have it read so many more batches of rows: tokens, cpu_s, wall_s.

        Raises:
            UserError: it failed.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{name} {batches}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it last said is in the answer
        return self._answer()

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().strip() or f"it ended with code {code}").splitlines()[-1]
        raise UserError(f"bench harvest: sae_lens: {last}")
