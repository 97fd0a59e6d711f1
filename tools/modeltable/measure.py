"""One row of the table: build a family's model, save it, load it back as a user would, and try it."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from chatsae.errors import UserError
from chatsae.lm import checkpoint
from chatsae.lm.load import LanguageModel
from chatsae.lm.probe import WAYS, choose_way, isolation
from chatsae.lm.tap import FORWARD_ERRORS, read_residuals, splice
from modeltable import families
from modeltable.overrides import LAYER_PATHS

TIMEOUT = 180.0  # seconds for one family
BATCHED = tuple(way for way in WAYS if way != "single")
_PRELOAD = ["chatsae.lm.load", "chatsae.lm.probe", "modeltable.families"]


@dataclass(frozen=True, slots=True)
class Row:
    """What a user gets of a family: a way to read it, an `error`, or `unbuilt`, why no small model was made.

    `errors` holds median and 90 % quantile of the isolation error for each of `BATCHED`, or why it is refused.
    """

    family: str
    loaded: str = ""
    way: str = ""
    errors: tuple[tuple[float, float] | str, ...] = ()
    notes: tuple[str, ...] = ()
    error: str = ""
    unbuilt: str = ""


def rows(names: Sequence[str]) -> Iterator[Row]:
    """A row for each family, each in a process of its own: one that hangs or dies costs its own row only."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    for name in names:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(name, sender))
        process.start()
        sender.close()
        try:
            yield receiver.recv() if receiver.poll(TIMEOUT) else Row(name, unbuilt=f"took over {TIMEOUT:.0f} s")
        except EOFError:
            process.join()
            yield Row(name, unbuilt=f"its process ended with exit code {process.exitcode}")
        finally:
            process.kill()
            process.join()
            receiver.close()


def _work(name: str, sender: Connection) -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as directory:
        sender.send(measure(name, Path(directory)))


def measure(name: str, directory: Path) -> Row:
    """The row of one family; its small random checkpoint is left in the directory."""
    try:
        families.small_config(name).save_pretrained(directory)
        config = checkpoint.read_config(checkpoint.locate(directory))
        families.save(families.build(config), directory)
    except UserError as error:
        return Row(name, error=_bare(error, directory))
    except Exception as error:  # noqa: BLE001 - whatever an architecture raises on small sizes is the reason
        return Row(name, unbuilt=f"{type(error).__name__}: {_bare(error, directory)}")
    path = LAYER_PATHS.get(name)
    notes = [f"needs `model.layer_path` {path}"] if path else []
    try:
        lm = LanguageModel(directory, families.LAYERS, device="cpu", layer_path=path)
        return Row(
            family=name,
            loaded="cut" if lm.cut else "whole",
            way=choose_way(lm).way,
            errors=tuple(isolation(lm, way) for way in BATCHED),
            notes=(*notes, *_differences(lm, path)),
        )
    except UserError as error:
        return Row(name, error=_bare(error, directory))
    except FORWARD_ERRORS as error:  # a defect: a user gets a traceback
        return Row(name, error=f"{type(error).__name__}, not caught: {_bare(error, directory)}")


def _differences(lm: LanguageModel, path: str | None) -> list[str]:
    """Where the cut model differs from the whole one, or a layer from what transformers calls its hidden state."""
    try:
        whole = LanguageModel(lm.name, lm.layers, device="cpu", layer_path=path, head=True)
    except UserError as error:
        return [_bare(error, Path(lm.name))]
    ids = torch.randint(lm.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        full = read_residuals(whole, ids)
        notes = _compared("the cut model", read_residuals(lm, ids), full)
        notes += _compared("the model with its head", _through_head(whole, ids), full)
        output = whole.decoder(input_ids=ids, use_cache=False, output_hidden_states=True)
    states = getattr(output, "hidden_states", None)
    if not states:
        return [*notes, "has no `hidden_states` to compare with"]
    for offset in (1, 0):  # some do not count the embedding as a state
        at = [layer + offset for layer in whole.layers]
        if max(at) < len(states) and all(torch.equal(states[i], r) for i, r in zip(at, full, strict=True)):
            return notes if offset else [*notes, "its `hidden_states` start after the first block"]
    return [*notes, "its `hidden_states` are something else"]


def _through_head(whole: LanguageModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """The residual streams of a forward of the whole model, as generation and evaluation run it."""
    found: list[torch.Tensor] = []
    with ExitStack() as stack:
        for layer in whole.layers:
            stack.enter_context(splice(whole, layer, lambda x: found.append(x) or x))
        whole.model(input_ids=ids, use_cache=False)
    return found


def _compared(what: str, these: Sequence[torch.Tensor], those: Sequence[torch.Tensor]) -> list[str]:
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(these, those, strict=True))
    same = all(torch.equal(a, b) for a, b in zip(these, those, strict=True))
    return [] if same else [f"{what} differs by {worst:.1e}"]


def _bare(error: Exception, directory: Path) -> str:
    """The text of an error in one line, without the name of a temporary directory."""
    text = " ".join(str(error).split()).replace(f"{directory}: ", "").replace(str(directory), "the model")
    return text or "no message"
