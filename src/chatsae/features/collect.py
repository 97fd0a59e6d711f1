"""One pass of a language model over a split, for every feature of every SAE; resumes to the same bits."""

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from chatsae import console
from chatsae.batch import TokenBatch, first
from chatsae.config import Way
from chatsae.data.store.manifest import changes
from chatsae.errors import UserError
from chatsae.features.firings import digest, firings
from chatsae.features.keeper import Keeper, Split
from chatsae.features.records import Options
from chatsae.files import read_object, sha256, whole, with_checksum, write_json
from chatsae.lm.budget import choose_budget
from chatsae.lm.forward import check_tokens
from chatsae.lm.harvest import Harvest
from chatsae.lm.load import LanguageModel
from chatsae.lm.probe import choose_way
from chatsae.sae.base import SAE

SECONDS = 60.0
"""Between checkpoints of a pass."""

_POOL = 1024  # dialogues that are sorted by length together


@dataclass(frozen=True, slots=True)
class Reading:
    """How the model is read: the same way, prefix and budget give the same bits."""

    way: Way
    prefix: bool
    token_budget: int
    on_nan: Literal["stop", "skip"] = "stop"

    @staticmethod
    def of(lm: LanguageModel, token_budget: int = 0, on_nan: Literal["stop", "skip"] = "stop") -> "Reading":
        """The way that is exact for this model here, and the budget asked for, or one that is chosen."""
        chosen = choose_way(lm)
        prefix = chosen.prefix and lm.device.type == "cpu"
        return Reading(chosen.way, prefix, token_budget or choose_budget(lm, chosen.way), on_nan)


def gather(stream: Iterable[TokenBatch], limit: int | None = None) -> TokenBatch:
    """The first `limit` dialogues in one batch; names that stand twice get their index behind them.

    Raises:
        UserError: there is none.
    """
    batches = list(first(stream, limit))
    if not sum(map(len, batches)):
        raise UserError("there is no dialogue to look for contexts in")
    merged = TokenBatch.concat(batches)
    seen = Counter(merged.names)
    names = tuple(name if seen[name] == 1 else f"{name} #{i}" for i, name in enumerate(merged.names))
    if len(merged.input_ids) >= 2**32 - 1:
        raise UserError(f"{len(merged.input_ids):,} tokens are too many for one pass; ask for fewer dialogues")
    return replace(merged, names=names)


def identity(saes: Mapping[str, SAE], lm: LanguageModel, tokens: TokenBatch, options: Options) -> dict[str, Any]:
    """What a pass follows from, as JSON holds it."""
    asked = {k: v for k, v in asdict(options).items() if k in ("kept", "sampled", "one_per_dialogue", "seed")}
    return {
        "pass_version": 1,
        "model": lm.label,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "n_dialogues": len(tokens),
        "n_tokens": len(tokens.input_ids),
        "tokens_sha256": tokens_digest(tokens),
        "sae_sha256": {name: digest(sae) for name, sae in saes.items()},
        **asked,
    }


def tokens_digest(tokens: TokenBatch) -> str:
    """sha256 of the ids of all tokens."""
    return hashlib.sha256(tokens.input_ids.numpy().tobytes()).hexdigest()


def collect(
    saes: Mapping[str, SAE],
    lm: LanguageModel,
    tokens: TokenBatch,
    options: Options,
    *,
    reading: Reading,
    folder: Path | None = None,
    seconds: float = SECONDS,
    tally: Counter[str] | None = None,
) -> tuple[dict[str, Keeper], Reading]:
    """Every SAE's keeper after all dialogues, and how the model was read.

    With a `folder` its state is written there about every `seconds`, and a state of the same pass that is found there
    is gone on from, read as it was begun.

    Raises:
        UserError: the model cannot take a dialogue, an SAE is not of this model, or a number is not finite.
        KeyboardInterrupt: Ctrl-C, after the state was written.
    """
    check(saes, lm)
    check_tokens(lm, tokens)
    split = Split(tokens)
    keepers = {name: Keeper(split, sae.spec.d_sae, options) for name, sae in saes.items()}
    what = identity(saes, lm, tokens, options)
    done = 0
    if folder is not None and (found := load_state(folder, what, keepers)) is not None:
        done, reading = found
    with console.stop_requested("this batch") if folder else nullcontext() as stop:
        stream = harvest(lm, tokens, reading, skip=done, tally=tally)
        last = time.monotonic()
        with console.progress("features", len(tokens)) as advance:
            for batch, acts, _, index in stream:
                for name, sae in saes.items():
                    for fired in firings(sae, acts[lm.layers.index(sae.spec.layer)], index):
                        keepers[name].add(fired)
                done += 1
                advance(len(batch))
                if folder is not None and (time.monotonic() - last >= seconds or (stop and stop.is_set())):
                    save_state(folder, what, keepers, done, reading)
                    last = time.monotonic()
                if stop is not None and stop.is_set():
                    raise KeyboardInterrupt
    for keeper in keepers.values():
        keeper.state()
    return keepers, reading


def harvest(
    lm: LanguageModel, tokens: TokenBatch, reading: Reading, *, skip: int = 0, tally: Counter[str] | None = None
) -> Iterator[tuple[TokenBatch, torch.Tensor, np.ndarray, np.ndarray]]:
    """Batches of dialogues, their activations [L, N, D], and the indices of their dialogues and of their tokens."""
    place = {name: i for i, name in enumerate(tokens.names)}
    starts = tokens.cu_seqlens.numpy().astype(np.int64)
    read = Harvest(
        lm,
        [tokens],
        way=reading.way,
        prefix=reading.prefix,
        token_budget=reading.token_budget,
        pool=_POOL,
        skip=skip,
        on_nan=reading.on_nan,
        tally=tally,
    )
    for batch in read:
        dialogues = np.array([place[name] for name in batch.tokens.names])
        index = np.concatenate([np.arange(starts[d], starts[d + 1]) for d in dialogues])
        yield batch.tokens, batch.acts, dialogues, index


def check(saes: Mapping[str, SAE], lm: LanguageModel) -> None:
    """Refuse SAEs that are not of this model as it was loaded.

    Raises:
        UserError: there is none, or one has another width, or a layer that is not read.
    """
    if not saes:
        raise UserError("there is no SAE to look at")
    for name, sae in saes.items():
        lm.check_width(name, sae.spec.d_in)
        if sae.spec.layer not in lm.layers:
            read = ", ".join(map(str, lm.layers)) or "none"
            raise UserError(f"{name}: layer is {sae.spec.layer}, {lm.name} was loaded to read layers {read}")
        if not all(bool(torch.isfinite(t).all()) for t in sae.file_tensors().values()):
            raise UserError(f"{name}: its weights hold NaN or infinite numbers")


def save_state(
    folder: Path, what: Mapping[str, Any], keepers: Mapping[str, Keeper], done: int, reading: Reading
) -> None:
    """Write the state of a pass; a kill at any moment leaves the previous one whole.

    Raises:
        UserError: it cannot be written.
    """
    name = f"state-{done}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"{sae}/{key}": array for sae, keeper in keepers.items() for key, array in keeper.state().items()}
        with whole(folder / name) as new:
            save_file(arrays, new)
        facts = {"what": what, "file": name, "sha256": sha256(folder / name), "done": done, "reading": asdict(reading)}
        write_json(folder / "state.json", with_checksum(facts))
        for old in folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from None


def load_state(folder: Path, what: Mapping[str, Any], keepers: Mapping[str, Keeper]) -> tuple[int, Reading] | None:
    """Fill the keepers with the state of the same pass; batches done and how they were read, or None."""
    path = folder / "state.json"
    if not path.is_file():
        return None
    try:
        facts = read_object(path)
        if changes(facts["what"], what):
            return None
        if sha256(folder / facts["file"]) != facts["sha256"]:
            raise ValueError("its content does not match its sha256")
        arrays = load_file(folder / facts["file"])
        for sae, keeper in keepers.items():
            keeper.load({key.removeprefix(f"{sae}/"): a for key, a in arrays.items() if key.startswith(f"{sae}/")})
        console.say(f"the pass goes on after batch {facts['done']:,}")
        return facts["done"], Reading(**facts["reading"])
    except (UserError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        console.warn(f"{path} is damaged ({error}); the pass starts anew")
        return None


def pass_names(folder: Path) -> list[str]:
    """The SAEs, and random directions beside them, of the pass whose state is in a folder; none if it is damaged."""
    try:
        return list(read_object(folder / "state.json")["what"]["sae_sha256"])
    except (UserError, KeyError, TypeError):
        return []
