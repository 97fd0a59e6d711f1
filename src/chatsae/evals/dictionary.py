"""Scores of an SAE against a true dictionary: which features it found, and whether their latents fire when they do.

MCC, uniqueness and the figures over latents are those of sae_lens 6 (`sae_lens.synthetic`), to be comparable; what is
reported by group looks from the true features instead, so that latents beyond their number do not count.

Letters in shapes: J true features; else `chatsae.batch`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from chatsae.errors import UserError
from chatsae.evals.groups import NAMES, WHOLE
from chatsae.evals.reconstruction import Labelled, Reconstruction, Stream, figures
from chatsae.evals.synthetic import SPECIAL_IDS, Sample
from chatsae.sae.base import SAE

Scores = dict[str, float | int | None]

_TOKENS = 8192  # scored at a time, in whole dialogues
_WHOLE_FIGURES = ("explained_variance", "l0", "l1", "l2_ratio", "relative_bias", "cosine")
_PARTS = ("position_0", "constant_prefix", "template", "content")


class CoFirings:
    """On how many tokens each latent, each true feature and both of them are active; exact in any batching."""

    def __init__(self, d_sae: int, n_features: int) -> None:
        self.both = torch.zeros(d_sae, n_features, dtype=torch.float64)
        self.latents = torch.zeros(d_sae, dtype=torch.float64)
        self.truths = torch.zeros(n_features, dtype=torch.float64)
        self.n = 0

    def add(self, feature_acts: Float[Tensor, "N F"], features: Float[Tensor, "N J"]) -> None:
        """Count a batch of tokens; active is what is not 0."""
        fires, true = (feature_acts != 0).float(), (features != 0).float()
        self.both += (fires.T @ true).double()  # float32 counts exactly up to 2²⁴ tokens
        self.latents += fires.sum(0, dtype=torch.float64)
        self.truths += true.sum(0, dtype=torch.float64)
        self.n += len(fires)

    def precision(self) -> Float[Tensor, "F J"]:
        """Share of a latent's firings on which the feature fires; 0 for a latent that never does."""
        return self.both / self.latents.clamp_min(1)[:, None]

    def recall(self) -> Float[Tensor, "F J"]:
        """Share of a feature's firings on which the latent fires; 0 for a feature that never does."""
        return self.both / self.truths.clamp_min(1)

    def f1(self) -> Float[Tensor, "F J"]:
        """Harmonic mean of precision and recall."""
        return 2 * self.both / (self.latents[:, None] + self.truths).clamp_min(1)


def cosines(W_dec: Float[Tensor, "F D"], dictionary: Float[Tensor, "J D"]) -> Float[Tensor, "F J"]:
    """Cosines of all latents with all true features, in float64; 0 with a row of zeros."""
    a, b = (m.detach().double() for m in (W_dec, dictionary))
    a, b = (m / m.norm(dim=1, keepdim=True).clamp_min(1e-8) for m in (a, b))
    return a @ b.T


def match(cosine: Float[Tensor, "F J"]) -> Int[Tensor, " J"]:
    """The latent of each true feature where every latent has at most one feature and the sum of |cos| is largest.

    -1 where there are more features than latents. Exact (Hungarian method).

    Raises:
        UserError: scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError("matching a dictionary needs scipy: pip install scipy") from None
    latents, features = linear_sum_assignment(cosine.abs().cpu().numpy(), maximize=True)
    found = torch.full((cosine.shape[1],), -1)
    found[torch.from_numpy(features)] = torch.from_numpy(latents)
    return found


def mcc(W_dec: Float[Tensor, "F D"], dictionary: Float[Tensor, "J D"]) -> float:
    """Mean |cos| of the pairs of `match` (arXiv 2505.20254).

    Raises:
        UserError: scipy is not installed.
    """
    cosine = cosines(W_dec, dictionary)
    return float(_matched(cosine, match(cosine)).nanmean())


def dictionary_scores(
    W_dec: Float[Tensor, "F D"],
    dictionary: Float[Tensor, "J D"],
    firings: CoFirings,
    groups: Mapping[str, slice],
) -> dict[str, Scores]:
    """Scores of `all` true features and of each group; None where a group has no feature, or none that fires.

    n_features; n_firing: those that fire on a token that was counted, the only ones that precision, recall and f1 see.
    mcc: mean |cos| of the group's pairs in the matching of the whole dictionary. mmcs: mean over features of the
    largest cosine with a latent. precision, recall, f1: of the latent with the largest |cos| as a detector of the
    feature. best_f1: of whichever latent detects the feature best, wherever it points. covered: share of the features
    that are the best match of at least one latent.

    `all` also has `uniqueness` and `latent_precision`, `latent_recall`, `latent_f1`: means over latents, each judged
    by the feature with the largest |cos|, as sae_lens 6 has them.

    Raises:
        UserError: scipy is not installed.
    """
    cosine = cosines(W_dec, dictionary)
    best = cosine.abs().argmax(dim=0)  # latent of each feature
    every = torch.arange(len(best))
    target = cosine.abs().argmax(dim=1)  # feature of each latent
    f1 = firings.f1()
    columns = {
        "mcc": _matched(cosine, match(cosine)),
        "mmcs": cosine.amax(dim=0),
        "covered": torch.bincount(target, minlength=len(best)).clamp_max(1).double(),
    }
    detectors = {
        "precision": firings.precision()[best, every],
        "recall": firings.recall()[best, every],
        "f1": f1[best, every],
        "best_f1": f1.amax(dim=0),
    }
    scores: dict[str, Scores] = {}
    for name, where in {"all": slice(None), **groups}.items():
        active = firings.truths[where] > 0
        scores[name] = {"n_features": len(active), "n_firing": int(active.sum())}
        scores[name] |= {key: _mean(column[where]) for key, column in columns.items()}
        scores[name] |= {key: _mean(column[where][active]) for key, column in detectors.items()}
    latents = torch.arange(len(target))
    scores["all"]["uniqueness"] = len(target.unique()) / len(target)
    for key, table in (("precision", firings.precision()), ("recall", firings.recall()), ("f1", f1)):
        scores["all"][f"latent_{key}"] = _mean(table[latents, target])
    return scores


@dataclass(frozen=True)
class Judged:
    """An SAE on whole isolated dialogues: its reconstruction, and its scores by group of true features."""

    figures: Scores
    groups: dict[str, Scores]


@torch.no_grad()
def judge(sae: SAE, sample: Sample, dictionary: Float[Tensor, "J D"], groups: Mapping[str, slice]) -> Judged:
    """Everything about an SAE on `SyntheticChat.dialogues`.

    Figures are those of `chatsae.evals.reconstruction`: mse (eq. 7) of all tokens, of those outside the constant prefix
    (`mse_no_prefix`) and of each part (`mse/content` ...); the mean over tokens instead of dialogues (`mse_token`), and
    without position 0; the variants of mse_st; explained variance outside the prefix (`explained_variance_no_prefix`);
    dead_fraction; and the true features per token (`true_l0`).

    Raises:
        UserError: scipy is not installed.
    """
    d_in, d_sae = sae.W_enc.shape
    stream, sums, firings = Stream(d_in), Reconstruction(d_in, d_sae), CoFirings(d_sae, len(dictionary))
    bounds = sample.tokens.cu_seqlens.tolist()
    begin = 0
    for i in range(len(sample.tokens)):
        if bounds[i + 1] - bounds[begin] < _TOKENS and i + 1 < len(sample.tokens):
            continue
        rows = slice(bounds[begin], bounds[i + 1])
        x = sample.acts[rows]
        batch = Labelled.of(sample.tokens.select(range(begin, i + 1)), SPECIAL_IDS)
        feature_acts = sae.encode(x)
        sums.add(x.double(), sae.decode(feature_acts), feature_acts, batch, stream.add(x.double(), batch))
        firings.add(feature_acts, sample.features(rows))
        begin = i + 1
    found = dictionary_scores(sae.W_dec, dictionary, firings, groups)
    return Judged(_figures(stream, sums) | {"true_l0": float(firings.truths.sum()) / firings.n}, found)


def _figures(stream: Stream, sums: Reconstruction) -> Scores:
    def mse(partition: str, part: str) -> float | None:
        i = NAMES.index((partition, part))
        return float(sums.eq7[i] / sums.eq7_n[i]) if sums.eq7_n[i] else None

    def more(partition: str, part: str) -> Scores:
        i = NAMES.index((partition, part))
        return figures(int(sums.n[i]), float(stream.x2[i]), stream.x[i], sums.sums[i])[0] if sums.n[i] else {}

    whole, outside = more(WHOLE, ""), more("prefix", "outside")
    found: Scores = {"mse": mse(WHOLE, ""), "mse_no_prefix": mse("prefix", "outside")}
    found |= {f"mse/{part}": mse("part", part) for part in _PARTS}
    i, first = NAMES.index((WHOLE, "")), NAMES.index(("position", "0"))
    error, rest = sums.sums[i, 0] - sums.sums[first, 0], (sums.n[i] - sums.n[first]) * sums.d_in
    found |= {"mse_token": whole["mse_token"], "mse_token_no_first": float(error / rest) if rest else None}
    found |= {name: mse("special", variant) for name, variant in _SPECIAL.items()}
    found |= {name: whole[name] for name in _WHOLE_FIGURES}
    found["explained_variance_no_prefix"] = outside.get("explained_variance")
    found["dead_fraction"] = float((sums.firings == 0).double().mean())
    return found


_SPECIAL = {"mse_st": "mse_st_template", "mse_st_no_first": "mse_st_no_first", "mse_st_no_prefix": "mse_st_no_prefix"}


def _matched(cosine: Float[Tensor, "F J"], latent: Int[Tensor, " J"]) -> Float[Tensor, " J"]:
    """|cos| of each feature with its latent, NaN without one."""
    found = cosine.abs()[latent.clamp_min(0), torch.arange(len(latent))]
    return torch.where(latent < 0, torch.nan, found)


def _mean(values: Float[Tensor, " K"]) -> float | None:
    """The mean of what is known."""
    known: Bool[Tensor, " K"] = ~values.isnan()
    return float(values[known].mean()) if known.any() else None
