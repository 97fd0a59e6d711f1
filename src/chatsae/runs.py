"""A run directory: config.yaml, environment.json, model.json, metrics.jsonl, saes/, checkpoints/, report.json."""

import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatsae import console
from chatsae.config import RunConfig, sae_specs
from chatsae.errors import UserError
from chatsae.files import (
    Lock,
    json_text,
    parse_json,
    read_object,
    settle,
    sha256,
    whole,
    with_checksum,
    write_json,
    write_text,
)
from chatsae.recipe import differences, load_recipe, to_yaml

_KEPT = 2  # checkpoints; the older one is there for the day the newer one is damaged


@dataclass(frozen=True)
class Checkpoint:
    """Everything a resume needs: tensors, and numbers that JSON keeps exactly."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Run:
    """One training run on disk. `open` to train in it, `read` to look at it."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config
        self._lock: Lock | None = None

    @classmethod
    def open(cls, path: Path | str, config: RunConfig) -> "Run":
        """Create the directory, or take up the run that is in it; one process at a time.

        Raises:
            UserError: the directory cannot be written, is in use, or holds a run of another recipe.
        """
        run = cls(Path(path), config)
        try:
            for name in ("saes", "checkpoints"):
                (run.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run directory {path} cannot be written: {error.strerror or error}") from None
        run._lock = Lock(run.path, "run directory")
        changed = differences(load_recipe(run.path / "config.yaml"), config) if run._started() else []
        if changed:
            run.close()
            raise UserError(
                f"run directory {path} holds a run of another recipe; choose another --out, or delete it. "
                f"Differences: {'; '.join(changed)}"
            )
        write_text(run.path / "config.yaml", to_yaml(config))
        write_json(run.path / "environment.json", environment())
        return run

    @classmethod
    def read(cls, path: Path | str) -> "Run":
        """The run in a directory.

        Raises:
            UserError: the directory is missing or holds no run.
        """
        path = Path(path)
        if not (path / "config.yaml").is_file():
            what = "holds no run (no config.yaml)" if path.is_dir() else "does not exist"
            raise UserError(f"run directory {path} {what}")
        settle(path)  # a run only: walking through whatever else was named could take long
        return cls(path, load_recipe(path / "config.yaml"))

    def _started(self) -> bool:
        """Whether there is anything that another recipe would overwrite."""
        kept = [*self._checkpoints(), *(self.path / "saes").iterdir()]
        return (self.path / "config.yaml").exists() and bool(kept or self.metrics())

    def close(self) -> None:
        """Let another process have the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def sae_directories(self) -> list[Path]:
        """The directories of the finished SAEs, in the order of the grid.

        Raises:
            UserError: there is none yet.
        """
        specs = sae_specs(self.config.sae, layers=tuple(sorted(self.config.model.layers)), d_in=1)
        found = [p for spec in specs if (p := self.path / "saes" / spec.name).joinpath("cfg.json").is_file()]
        if not found:
            raise UserError(f"run {self.path} has no finished SAE yet; `chatsae train` with the same recipe goes on")
        if gone := [spec.name for spec in specs if self.path / "saes" / spec.name not in found]:
            console.warn(f"run {self.path} is not whole: no cfg.json of {', '.join(gone)}; left out")
        return found

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a kill cut short is left out.

        Raises:
            UserError: another line is damaged.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        records = []
        for number, line in enumerate(lines[:-1], start=1):
            try:
                record = parse_json(line.decode())
                if not isinstance(record, dict) or type(record.get("step")) is not int:
                    raise ValueError("an object with a whole number 'step' was expected")
            except ValueError as error:
                raise UserError(f"{path}, line {number} is damaged ({error}); delete the line to go on") from None
            records.append(record)
        return records

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that are going to be repeated."""
        kept = [json.dumps(r) + "\n" for r in self.metrics() if r["step"] <= step]
        write_text(self.path / "metrics.jsonl", "".join(kept))

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; a kill at any moment leaves the previous ones whole.

        Raises:
            UserError: it cannot be written (a full disk, say); the previous ones are still there.
        """
        final = self.path / "checkpoints" / f"step-{checkpoint.step:09d}"
        with whole(final, "; the run goes on from the checkpoint before") as new:
            new.mkdir()
            file = new / "state.safetensors"
            save_file({k: v.contiguous() for k, v in checkpoint.tensors.items()}, file)
            facts = {"step": checkpoint.step, "sha256": sha256(file), "facts": checkpoint.facts}
            (new / "state.json").write_text(json_text(with_checksum(facts)), encoding="utf-8")
        for old in self._checkpoints()[:-_KEPT]:
            shutil.rmtree(old)

    def load_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None; damaged ones are named and passed over."""
        for path in reversed(self._checkpoints()):
            try:
                facts = read_object(path / "state.json", keys={"step": int, "sha256": str, "facts": dict})
                if sha256(path / "state.safetensors") != facts["sha256"]:
                    raise ValueError("its content does not match its sha256")
                tensors = load_file(path / "state.safetensors")
                return Checkpoint(step=facts["step"], tensors=tensors, facts=facts["facts"])
            except (UserError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                console.warn(f"checkpoint {path} is damaged ({error}); the one before it is used")
        return None

    def clear_checkpoints(self) -> None:
        """Free the disk once the run is finished; files of others stay."""
        for path in self._checkpoints():
            shutil.rmtree(path)

    def _checkpoints(self) -> list[Path]:
        """The directories of checkpoints, the oldest first."""
        return sorted(path for path in (self.path / "checkpoints").glob("step-*") if path.is_dir())


def environment() -> dict[str, Any]:
    """What a run ran on: versions, processor, platform."""
    packages = ("chatsae", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        **{name: metadata.version(name) for name in packages},
    }
