"""What is known about the features of an SAE: the records that the judge, the page and the exports read."""

from dataclasses import dataclass

from chatsae.errors import UserError


@dataclass(frozen=True, slots=True)
class Context:
    """A window of a dialogue around a token on which a feature is active; sequences have one entry per token."""

    feature: int
    dialogue: str
    """Name of the dialogue in its source."""
    value: float
    """The feature's activation at `peak`; of the strongest contexts, one per dialogue, the largest in the window."""
    quantile: float | None
    """None: one of the feature's strongest contexts; else the share of its activations that are smaller."""
    start: int
    """Position in the dialogue of the window's first token."""
    peak: int
    """Index in the window of the token with `value`."""
    input_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """The text of each token; together they are the text of the window."""
    acts: tuple[float, ...]
    """The feature's activation on each token; 0 where it is silent."""
    role: tuple[int, ...]
    """`chatsae.batch.Role` of each token."""
    kind: tuple[int, ...]
    """`chatsae.batch.Kind` of each token."""
    turn: tuple[int, ...]
    """Index of the message each token belongs to; -1 before the first."""
    prefix: tuple[bool, ...]
    """Whether a token belongs to the prefix that every dialogue of the template begins with."""
    index: int = -1
    """Index of the dialogue in the interpretation split; -1: it is not from one."""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature of an SAE over an interpretation split, with the contexts that were asked for.

    Counts are of tokens on which it is active, by the codes of `chatsae.batch.Role`, of `chatsae.batch.Kind`, by
    `POSITIONS`, and by its activation, `VALUES_PER_OCTAVE` bins per octave from `VALUE_EDGES[0]` on.
    """

    index: int
    density: float
    """Share of the tokens on which it is active."""
    max_act: float
    contexts: tuple[Context, ...]
    """The strongest ones, strongest first, at most one per dialogue unless asked."""
    sampled: tuple[Context, ...]
    """Contexts over the quantiles of its activations, ascending."""
    promoted: tuple[tuple[str, float], ...]
    """Tokens whose logit the decoder direction raises most (logit lens), with the change."""
    suppressed: tuple[tuple[str, float], ...]
    mean_act: float = 0.0
    """Over all tokens, those on which it is silent included."""
    value_counts: tuple[int, ...] = ()
    role_counts: tuple[int, ...] = ()
    kind_counts: tuple[int, ...] = ()
    position_counts: tuple[int, ...] = ()
    role_means: tuple[float, ...] = ()
    """Its mean activation over the tokens of each role; 0 where there is no such token."""
    kind_means: tuple[float, ...] = ()
    position_means: tuple[float, ...] = ()
    decoder_neighbours: tuple[tuple[int, float], ...] = ()
    """Features with the closest decoder directions, with the cosine."""
    cofiring: tuple[tuple[int, float, float], ...] = ()
    """Features that fire with it: their index, the correlation of firing, and the share of its tokens they fire on."""


POSITIONS = ("0", "1-7", "8-63", "64-511", "512+")
"""Names of the position buckets, in the order of their counts."""

VALUES_PER_OCTAVE = 2
VALUE_BINS = 64
VALUE_EDGES = tuple(2.0 ** (i / VALUES_PER_OCTAVE - 12) for i in range(VALUE_BINS + 1))
"""Edges of the bins of activations, 2^-12 to 2^20; what is beyond is counted in the outermost ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is kept of a pass, and shown of it."""

    features: int | tuple[int, ...] = 512
    """Features with contexts: so many live ones, chosen by `seed` (0: all of them), or those named."""
    also: tuple[int, ...] = ()
    """Features with contexts beside those."""
    contexts: int = 20
    """Strongest contexts of each."""
    sampled: int = 20
    """Contexts of each that are sampled from all its activations."""
    window: int = 64
    """Tokens of a context; the whole dialogue where that is shorter."""
    kept: int = 100
    """Strongest positions that are kept of every feature, so that contexts of others can be made without a pass."""
    one_per_dialogue: bool = True
    """False: the strongest contexts of a feature may come from one dialogue."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("contexts", "sampled", "window", "kept"):
            least = 0 if name == "sampled" else 1
            if getattr(self, name) < least:
                raise UserError(f"features.{name}: at least {least} is needed, {getattr(self, name)} given")
        if self.contexts > self.kept:
            raise UserError(f"features.contexts: {self.contexts} given, but only {self.kept} positions are kept")
        if isinstance(self.features, int) and self.features < 0:
            raise UserError(f"features.features: at least 0 is needed, {self.features} given")
