"""The figures of a line of metrics.jsonl: of all steps since the line before, also across a stop and a resume."""

from itertools import pairwise

import pytest

from chatsae.sae.grid import build_grid
from chatsae.training import loop
from chatsae.training.loop import make_states, train_states
from test_training_gsnr import LAYERS, Batches, Log, config, specs


class Numbered(Batches):
    """Batches that are gone on with where a checkpoint was made; the `sink`-th holds a token of huge norm."""

    def __init__(self, n: int, sink: int = 0) -> None:
        super().__init__(n)
        self._at = 0
        self.all[sink - 1][:, 0] *= 100

    def __next__(self):
        if self._at == len(self.all):
            raise StopIteration
        self._at += 1
        return self.all[self._at - 1]

    def state_dict(self):
        return {"at": self._at}

    def load_state_dict(self, state):
        self._at = state["at"]


class Stopped(Log):
    """Keeps its last checkpoint, and ends the training there."""

    checkpoint = None

    def save_checkpoint(self, checkpoint) -> None:
        self.checkpoint = checkpoint
        raise KeyboardInterrupt


def saes(how):
    return make_states(build_grid(specs(), seed=1), how)


@pytest.mark.parametrize("step", ["plain", "fast"])
def test_the_mse_of_a_line_is_the_mean_over_the_steps_since_the_line_before(monkeypatch, step):
    if step == "fast":
        pytest.importorskip("numba")
    seen: dict[str, list[float]] = {spec.name: [] for spec in specs()}
    real = loop.train_step

    def spied(state, x, **how):
        losses = real(state, x, **how)
        seen[state.sae.spec.name].append(losses.mse.item() / 12)
        return losses

    monkeypatch.setattr(loop, "train_step", spied)
    how, log = config(step=step, gsnr=False), Log()
    train_states(saes(how), Numbered(230, sink=100), how, layers=LAYERS, run=log)
    assert [record["step"] for record in log.records] == [50, 100, 150, 200, 230]
    edges = [0, 50, 100, 150, 200, 230]
    for name, values in seen.items():
        means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
        assert [record["saes"][name]["mse"] for record in log.records] == pytest.approx(means, rel=1e-6)
        assert values[99] > 10 * means[1]  # the batch of the line itself says nothing of the others


def test_a_stop_between_lines_and_a_resume_log_the_same_bits():
    whole, how = Log(), config(step="plain", gsnr=False)
    train_states(saes(how), Numbered(230), how, layers=LAYERS, run=whole)
    first, rest = Stopped(), Log()
    stops = config(step="plain", gsnr=False, checkpoint_every=120)
    with pytest.raises(KeyboardInterrupt):
        train_states(saes(how), Numbered(230), stops, layers=LAYERS, run=first)
    train_states(saes(how), Numbered(230), how, layers=LAYERS, run=rest, checkpoint=first.checkpoint)
    assert [record["step"] for record in rest.records] == [150, 200, 230]
    assert [record["saes"] for record in first.records + rest.records] == [record["saes"] for record in whole.records]


def test_a_checkpoint_of_before_there_were_means_begins_them_anew():
    how, first, rest = config(step="plain", gsnr=False), Stopped(), Log()
    with pytest.raises(KeyboardInterrupt):
        train_states(saes(how), Numbered(230), config(step="plain", checkpoint_every=120), layers=LAYERS, run=first)
    assert first.checkpoint is not None
    for kept in (first.checkpoint.tensors, first.checkpoint.facts):
        for key in [key for key in kept if key.startswith("errors/")]:
            del kept[key]
    train_states(saes(how), Numbered(230), how, layers=LAYERS, run=rest, checkpoint=first.checkpoint)
    assert all(0 < own["mse"] < 1e4 for record in rest.records for own in record["saes"].values())
