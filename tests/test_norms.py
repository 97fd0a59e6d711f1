"""Norms by layer, sinks, and what is done with them before training; normalised activations fold back."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatsae.batch import ActivationBatch, TokenBatch
from chatsae.cli import main
from chatsae.config import RunConfig
from chatsae.errors import UserError
from chatsae.lm.harvest import bare_tokens
from chatsae.lm.norms import POSITIONS, SINK_RATIO, LayerNorms, measure_norms
from chatsae.recipe import load_recipe
from chatsae.sae.base import SAE
from chatsae.sae.init import init_sae
from chatsae.training import inputs, session
from chatsae.training.inputs import Inputs, scale_of, unscale_
from chatsae.training.session import train_run
from sae_samples import spec
from tiny_models import tiny_model, tiny_tokenizer

LAYERS = (2, 5)


def batch(n: int, seed: int) -> ActivationBatch:
    """Two sequences of n tokens of norm about 8; position 0 is 1,000 times longer, at layer 5 alone."""
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(2, 2 * n, 64, generator=generator)
    acts[1, [0, n]] *= 1000
    return ActivationBatch(acts, bare_tokens([torch.arange(n), torch.arange(n)]))


class Stream(Iterator[ActivationBatch]):
    def __init__(self, n: int) -> None:
        self.made, self.n, self.seconds = 0, n, 0.0

    def __next__(self) -> ActivationBatch:
        if self.made == self.n:
            raise StopIteration
        self.made += 1
        return batch(40, self.made)

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.made}


def test_norms_are_those_of_the_activations() -> None:
    made = [batch(40, 1), batch(40, 2)]
    early, late = measure_norms(made, LAYERS)
    norm = torch.cat([b.acts for b in made], 1).norm(dim=-1)
    assert (early.layer, late.layer, late.n_tokens, early.n_sinks, late.n_sinks) == (2, 5, 160, 0, 4)
    assert late.median == float(norm[1].median())
    assert late.bound == SINK_RATIO * late.median
    assert late.mean == pytest.approx(float(norm[1][norm[1] < late.bound].mean()))
    assert late.norm_share == pytest.approx(float((norm[1][norm[1] > late.bound] ** 2).sum() / (norm[1] ** 2).sum()))
    assert late.by_position[0] == pytest.approx(float(norm[1][[0, 40, 80, 120]].median()))
    assert early.by_position[POSITIONS.index(64)] is None
    (place,) = late.places
    assert (place.position, place.token_id, place.part, place.n) == (0, 0, "position_0", 4)
    assert LayerNorms.of(json.loads(json.dumps(late.facts()))) == late


def test_what_has_no_norm_is_refused() -> None:
    with pytest.raises(UserError, match="there are no activations"):
        measure_norms([], LAYERS)
    still = replace(batch(3, 1), acts=torch.zeros(2, 6, 4))
    with pytest.raises(UserError, match="the median norm of the activations after block 2 is 0"):
        measure_norms([still], LAYERS)
    with pytest.raises(UserError, match="norms of a layer are damaged"):
        LayerNorms.of({"places": []})


@pytest.mark.parametrize("known", [False, True], ids=["at the start", "of a resume"])
def test_sinks_are_kept_left_out_or_shortened_and_counted(known: bool) -> None:
    norms = measure_norms([batch(40, 1)], LAYERS) if known else None
    raw = [one.acts for one in Stream(3)]
    told: list[list[LayerNorms]] = []

    def read(policy: inputs.Sinks, normalize: bool = False) -> tuple[list[torch.Tensor], Counter[str]]:
        tally: Counter[str] = Counter()
        stream = Inputs(
            Stream(3),
            LAYERS,
            policy=policy,
            normalize=normalize,
            known=norms,
            on_measured=told.append,
            tally=tally,
        )
        return [one.acts for one in stream], tally

    kept, tally = read("keep")
    assert all(torch.equal(a, b) for a, b in zip(kept, raw, strict=True))
    assert not tally
    left, tally = read("skip")
    whole = [i for i in range(80) if i % 40]
    assert all(torch.equal(a, b[:, whole]) for a, b in zip(left, raw, strict=True))
    assert tally == {"sink left out (position 0)": 6}
    short, tally = read("clip")
    (own,) = {one[1].bound for one in told} or {norms[1].bound if norms else None}
    assert tally == {"sink shortened (position 0)": 6}
    assert all(torch.equal(a[:, whole], b[:, whole]) for a, b in zip(short, raw, strict=True))
    for a, b in zip(short, raw, strict=True):
        assert a[1, [0, 40]].norm(dim=-1) == pytest.approx([own, own], rel=1e-5)
        assert torch.nn.functional.cosine_similarity(a[1], b[1]).min() > 0.9999
        assert torch.equal(a[0], b[0])  # no sink at that layer
    scaled, _ = read("skip", normalize=True)
    lengths = torch.cat(scaled, 1).norm(dim=-1).mean(1)
    assert lengths.tolist() == pytest.approx([64**0.5] * 2, rel=0.02)
    assert bool(told) is not known


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("form", ["paper", "v6"])
def test_an_sae_of_scaled_activations_folds_into_one_of_the_activations(architecture: str, form: str) -> None:
    sae = init_sae(spec(16, architecture=architecture, form=form), torch.Generator().manual_seed(0), torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for vector in (sae.b_enc, sae.b_dec):
            vector.copy_(torch.randn(vector.shape, generator=generator))
    factor, x = 0.17, torch.randn(50, 16, dtype=torch.float64, generator=generator)
    acts, out = sae.encode(factor * x), sae(factor * x)
    losses = sae.loss(factor * x, 1.0)
    unscale_(sae, factor)
    assert torch.allclose(sae.encode(x), acts / factor, rtol=1e-9, atol=1e-12)
    assert torch.allclose(sae(x), out / factor, rtol=1e-9, atol=1e-12)
    raw = sae.loss(x, 1.0)
    assert raw.total.item() == pytest.approx(losses.total.item() / factor**2)  # the same objective, in other units
    assert sae.metadata["activation_scale"] == factor


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a tiny model whose first token, a letter of its own, is a sink after block 1."""
    root = tmp_path_factory.mktemp("sinks")
    tokenizer = tiny_tokenizer(tiny_model(root / "model"))
    weights = root / "model" / "model.safetensors"
    assert weights.exists()
    with (root / "chat.jsonl").open("w") as file:
        for i in range(60):
            turns = [{"role": "user", "content": f"{i} alpha"}, {"role": "assistant", "content": "beta gamma " * 4}]
            file.write(json.dumps({"messages": turns}) + "\n")
    recipe = {
        "model": {"name": str(root / "model"), "layers": [0, 1]},
        "data": {"sources": [str(root / "chat.jsonl")], "max_length": 60, "epochs": 0, "ngram": 0},
        "harvest": {"token_budget": 256, "pool": 32},
        "buffer": {"capacity": 600},
        "sae": {"expansion_factors": [2], "lrs": [1e-3], "target_l0": [4], "normalize": "scale", "bandwidth": 1.0},
        "train": {"tokens": 3000, "batch_size": 50, "log_every": 5, "checkpoint_every": 25, "step": "plain"},
    }
    assert tokenizer is not None
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    return root


def config_of(world: Path) -> RunConfig:
    return load_recipe(world / "recipe.yaml")


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}/{name}": tensor
        for path in sorted(run.glob("saes/*/sae_weights.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("policy", ["keep", "skip", "clip"])
def test_a_run_goes_on_to_the_same_bits_and_needs_its_norms(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    monkeypatch.setattr("chatsae.lm.norms.SINK_RATIO", 1.2)  # so that there are some
    config = config_of(world)
    config = replace(config, train=replace(config.train, sinks=policy))
    train_run(config, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def die(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(session, "manifest_digest", die)
        with pytest.raises(Killed):
            train_run(config, tmp_path / "cut")
    train_run(config, tmp_path / "cut")
    whole, cut = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert (tmp_path / "whole" / "norms.json").read_bytes() == (tmp_path / "cut" / "norms.json").read_bytes()
    dropped = [json.loads((tmp_path / name / "summary.json").read_text())["dropped"] for name in ("whole", "cut")]
    assert dropped[0] == dropped[1]
    assert any("sink" in reason for reason in dropped[0]) is (policy != "keep")
    rows = [json.loads(line)["saes"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(("mse_no_sinks" in sae) is (policy == "keep") for row in rows for sae in row.values())
    assert all(sae["coefficient"] > 0 for row in rows for sae in row.values())


def test_saved_saes_read_the_activations_as_they_are(world: Path, tmp_path: Path) -> None:
    config = config_of(world)
    train_run(config, tmp_path / "run")
    assert main(["eval", str(tmp_path / "run"), "--dialogues", "8"]) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["saes"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())["saes"]
    norms = json.loads((tmp_path / "run" / "norms.json").read_text())["layers"]
    for name, row in last.items():
        sae = SAE.load(tmp_path / "run" / "saes" / name)
        layer = next(one for one in norms if one["layer"] == sae.spec.layer)
        assert sae.metadata["activation_scale"] == pytest.approx(scale_of(LayerNorms.of(layer), sae.spec.d_in))
        assert report[name]["mse_token"] == pytest.approx(row["mse"], rel=0.5)


def test_a_run_without_its_norms_is_not_gone_on_with(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "manifest_digest", die)
    with pytest.raises(KeyboardInterrupt):
        train_run(config_of(world), tmp_path / "run")
    (tmp_path / "run" / "norms.json").unlink()
    with pytest.raises(UserError, match=r"norms\.json"):
        train_run(config_of(world), tmp_path / "run")


def test_the_verb_prints_and_draws_every_layer(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["norms", str(world / "recipe.yaml"), "--tokens", "400"]
    assert main([*asked, "--figure", str(tmp_path / "norms.png"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    assert [one["layer"] for one in facts["layers"]] == list(range(len(facts["layers"])))
    assert main(asked) == 0
    table = capsys.readouterr().out
    assert "median norm" in table
    assert "at 0" in table
    assert main([*asked, "--figure", str(tmp_path / "norms.pdf")]) == 2
    assert "only .png and .svg" in capsys.readouterr().err


def test_a_part_is_position_0_then_prefix_then_template() -> None:
    tokens: TokenBatch = bare_tokens([torch.arange(4), torch.arange(4)])
    tokens = replace(tokens, kind=torch.tensor([1, 2, 2, 0, 2, 0, 0, 0], dtype=torch.uint8), prefix=tokens.position < 2)
    assert tokens.part.tolist() == [0, 1, 2, 3, 0, 1, 3, 3]
