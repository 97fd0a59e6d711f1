"""Role confusion: do features of user turns fire on document or tool text that imitates one?

Every user text T stands in eight places: in its own turn, the first of its dialogue, in a later turn, and in a document
and in a tool's answer, each time plain, after the template's header written as text (special tokens split), and after
the header's own special tokens. Activations are compared on the tokens of T, which are the same everywhere; filler puts
them at the same position in a document as in the first turn where it can. Letters in shapes: S texts, C conditions.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chatsae.audit.separation import Separation, auroc_interval, aurocs, choose, confirm
from chatsae.batch import Dialogue, Kind, Message, Role, TokenBatch
from chatsae.data.template import SkippedError, chat_template, control_ids, document_begin, encode
from chatsae.errors import UserError
from chatsae.lm.harvest import bare_tokens
from chatsae.lm.load import LanguageModel
from chatsae.sae.base import SAE
from chatsae.statistics import bootstrap

LONGEST = 48
"""Tokens of a user's text that are looked at."""
_LEAST = 4
FIRST, LATER, PLAIN = "real: first", "real: later", "document: plain"
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Imitations:
    """The texts in every condition. `ids[c][s]`: whole sequence; its last `lengths[s]` tokens are the text."""

    conditions: tuple[str, ...]
    ids: tuple[tuple[Tensor, ...], ...]
    lengths: tuple[int, ...]

    @property
    def start(self) -> dict[str, float]:
        """Mean position at which the text begins, by condition."""
        return {
            name: float(np.mean([len(row) - n for row, n in zip(rows, self.lengths, strict=True)]))
            for name, rows in zip(self.conditions, self.ids, strict=True)
        }


@dataclass(frozen=True, slots=True)
class RoleFeature:
    """A feature that was more active in user turns on half of the texts, on the other half.

    Its level in a real turn is that of the lower one of first and later turn. separation: of that level against the
    same text in a plain document. means: activation by condition. auroc: of each other condition against the plain
    document. reach: (condition - plain document) / (real level - plain document), with a 95 % bootstrap over texts: 0
    like a document, 1 like a user's turn.
    """

    feature: int
    chosen_auroc: float
    chosen_p: float
    separation: Separation
    means: Mapping[str, float]
    auroc: Mapping[str, tuple[float, tuple[float, float]]]
    reach: Mapping[str, tuple[float | None, tuple[float, float] | None]]


def imitations(lm: LanguageModel, dialogues: TokenBatch, limit: int, tally: Counter[str] | None = None) -> Imitations:
    """The first user text of up to `limit` dialogues in every condition; what is left out is counted in `tally`.

    Raises:
        UserError: there are fewer than 16 texts, or the template writes nothing before a user's text.
    """
    counts = Counter[str]() if tally is None else tally
    texts, leads, header = _texts(dialogues, limit, counts)
    if len(texts) < 16:
        raise UserError(f"role confusion: {len(texts)} dialogues have a user text of {_LEAST} tokens; 16 are needed")
    if not header:
        raise UserError("role confusion: the chat template writes nothing between the turn before and a user's text")
    fillers = _fillers(dialogues)
    forms = _headers(lm.tokenizer, header, counts)
    rows: dict[str, list[Tensor]] = {FIRST: [torch.cat(pair) for pair in zip(leads, texts, strict=True)]}
    later = _before(lm.tokenizer, "user")
    if isinstance(later, Tensor):
        rows[LATER] = [torch.cat([later, text]) for text in texts]
    else:
        counts[f"role confusion, later turn: {later}"] += 1
    for carrier, before in _carriers(lm.tokenizer, counts).items():
        for form, written in forms.items():
            made = []
            for i, (text, lead) in enumerate(zip(texts, leads, strict=True)):
                filler = _filler(fillers, i, len(lead) - len(before) - len(written))
                made.append(torch.cat([before, filler, written, text]))
            rows[f"{carrier}: {form}"] = made
    return Imitations(tuple(rows), tuple(map(tuple, rows.values())), tuple(map(len, texts)))


def mean_acts(lm: LanguageModel, saes: Mapping[str, SAE], found: Imitations) -> dict[str, Float[Tensor, "C S F"]]:
    """The mean activation of every feature over the tokens of each text, by SAE."""
    n = len(found.lengths)
    out = {name: torch.zeros(len(found.conditions), n, sae.spec.d_sae) for name, sae in saes.items()}
    flat = [row for rows in found.ids for row in rows]
    for batch in lm.harvest([bare_tokens(flat)]):
        ends = batch.tokens.cu_seqlens[1:].tolist()
        places = [(*divmod(int(name), n), end) for name, end in zip(batch.tokens.names, ends, strict=True)]
        chosen = torch.cat([torch.arange(end - found.lengths[s], end) for _, s, end in places])
        lengths = [found.lengths[s] for _, s, _ in places]
        for name, sae in saes.items():
            x = batch.acts[lm.layers.index(sae.spec.layer)][chosen.to(batch.acts.device)].to(sae.W_enc.device)
            with torch.no_grad():
                acts = torch.cat([sae.encode(part).float().cpu() for part in x.split(_CHUNK)])
            for (c, s, _), part in zip(places, acts.split(lengths), strict=True):
                out[name][c, s] = part.mean(0)
    return out


def role_features(
    conditions: Sequence[str], acts: Float[np.ndarray, "C S F"], *, top: int = 10, draws: int = 1000, seed: int = 0
) -> list[RoleFeature]:
    """User features: chosen on half of the texts as most active in real turns, all numbers from the other half."""
    order = np.random.default_rng(seed).permutation(acts.shape[1])
    half, rest = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    real, plain = _levels(conditions, acts)
    more = real[half].mean(0) > plain[half].mean(0)
    candidates = np.flatnonzero(more)
    if not len(candidates):
        return []
    chosen = choose(real[half][:, candidates], plain[half][:, candidates], top=top, draws=draws, seed=seed)
    chosen = [one for one in chosen if one.auroc > 0.5]
    features = [int(candidates[one.column]) for one in chosen]
    found = confirm(real[rest][:, features], plain[rest][:, features], [True] * len(features), seed=seed)
    return [
        _role_feature(conditions, acts[:, rest, k], k, (one.auroc, one.p_value), separation, seed)
        for k, one, separation in zip(features, chosen, found, strict=True)
    ]


def median_reach(features: Sequence[RoleFeature]) -> dict[str, float | None]:
    """By condition, the median reach of the features whose separation holds; None where there is none."""
    held = [one for one in features if one.separation.significant]
    names = features[0].reach if features else ()
    shares = {name: [value for one in held if (value := one.reach[name][0]) is not None] for name in names}
    return {name: float(np.median(values)) if values else None for name, values in shares.items()}


def _role_feature(
    conditions: Sequence[str],
    acts: Float[np.ndarray, "C S"],
    feature: int,
    chosen: tuple[float, float],
    separation: Separation,
    seed: int,
) -> RoleFeature:
    real, plain = _levels(conditions, acts)
    others = {name: acts[c] for c, name in enumerate(conditions) if name != PLAIN}
    n = len(plain)
    parts = {name: (other - plain, real - plain) for name, other in others.items()}
    between = bootstrap(parts, seed=seed)
    whole = float((real - plain).sum())
    aurocs_of = {name: float(aurocs(other[:, None], plain[:, None])[0]) for name, other in others.items()}
    return RoleFeature(
        feature=feature,
        chosen_auroc=chosen[0],
        chosen_p=chosen[1],
        separation=separation,
        means={name: float(acts[c].mean()) for c, name in enumerate(conditions)},
        auroc={name: (value, auroc_interval(value, n, n)) for name, value in aurocs_of.items()},
        reach={
            name: (float(part[0].sum()) / whole if whole > 0 else None, between[name]) for name, part in parts.items()
        },
    )


def _levels(
    conditions: Sequence[str], acts: Float[np.ndarray, "C *rest"]
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Activations in a real turn, the lower one of first and later, and in a plain document."""
    first, plain = acts[conditions.index(FIRST)], acts[conditions.index(PLAIN)]
    return np.minimum(first, acts[conditions.index(LATER)]) if LATER in conditions else first, plain


# --- texts and what stands before them --------------------------------------------------------------------------------


def _texts(
    dialogues: TokenBatch, limit: int, tally: Counter[str]
) -> tuple[list[Tensor], list[Tensor], tuple[int, ...]]:
    """The first user text of each dialogue, all tokens before it, and the header of its turn, the same in all."""
    found: list[tuple[Tensor, Tensor, tuple[int, ...]]] = []
    for start, stop in pairwise(dialogues.cu_seqlens.tolist()):
        if len(found) == limit:
            break
        ids, role, kind = (x[start:stop] for x in (dialogues.input_ids, dialogues.role, dialogues.kind))
        content = (role == int(Role.USER)) & (kind == int(Kind.CONTENT))
        where = content.nonzero().flatten()
        if not len(where):
            tally["role confusion: a dialogue without a user text"] += 1
            continue
        begin = int(where[0])
        ends = (~content[begin:]).nonzero().flatten()
        end = begin + min(int(ends[0]) if len(ends) else len(ids) - begin, LONGEST)
        header = begin
        while header and role[header - 1] == int(Role.USER) and kind[header - 1] != int(Kind.CONTENT):
            header -= 1
        if end - begin < _LEAST:
            tally[f"role confusion: a user text of under {_LEAST} tokens"] += 1
        else:
            found.append((ids[begin:end], ids[:begin], tuple(ids[header:begin].tolist())))
    usual = Counter(header for *_, header in found).most_common(1)
    header = usual[0][0] if usual else ()
    kept = [entry for entry in found if entry[2] == header]
    if len(kept) < len(found):
        tally["role confusion: another header before the user's text"] += len(found) - len(kept)
    return [text for text, _, _ in kept], [lead for _, lead, _ in kept], header


def _headers(tokenizer: PreTrainedTokenizerBase, header: tuple[int, ...], tally: Counter[str]) -> dict[str, Tensor]:
    """The header in its three forms: none, as text, and as the template writes it."""
    empty = torch.empty(0, dtype=torch.int64)
    found = {"plain": empty}
    text = str(tokenizer.decode(list(header), skip_special_tokens=False))
    split = tokenizer([text], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = torch.tensor(split[0], dtype=torch.int64)
    if control_ids(tokenizer).intersection(ids.tolist()):
        tally["role confusion, as text: the tokenizer does not split special tokens"] += 1
    else:
        found["text"] = ids
    return found | {"special": torch.tensor(header, dtype=torch.int64)}


def _carriers(tokenizer: PreTrainedTokenizerBase, tally: Counter[str]) -> dict[str, Tensor]:
    """What stands before the text of a document, and of a tool's answer where the template has one."""
    bos = document_begin(tokenizer)
    found = {"document": torch.tensor([] if bos is None else [bos], dtype=torch.int64)}
    before = _before(tokenizer, "tool")
    if isinstance(before, Tensor):
        return found | {"tool": before}
    tally[f"role confusion, tool: {before}"] += 1
    return found


def _before(tokenizer: PreTrainedTokenizerBase, role: str) -> Tensor | str:
    """What the template writes before the third turn of a dialogue, the turn of a role; or why it does not."""
    turns = (Message("user", "Read it."), Message("assistant", "I read it."), Message(role, "Document"))
    try:
        rendered = chat_template(tokenizer).render(Dialogue(role, "audit", turns))
    except SkippedError as reason:
        return str(reason)
    if rendered.spans is None:
        return "the place of its text is not found"
    ids = encode(tokenizer, [rendered.text[: rendered.spans[-1][0]]], offsets=False)["input_ids"][0]
    return torch.tensor(ids, dtype=torch.int64)


def _fillers(dialogues: TokenBatch) -> Tensor:
    """What assistants wrote in the dialogues, end to end."""
    return dialogues.input_ids[(dialogues.role == int(Role.ASSISTANT)) & (dialogues.kind == int(Kind.CONTENT))]


def _filler(fillers: Tensor, index: int, n: int) -> Tensor:
    """The first n tokens of another stretch for every text; none where n is not above 0."""
    if n <= 0 or len(fillers) <= n:
        return fillers[:0]
    start = index * 97 % (len(fillers) - n)
    return fillers[start : start + n]
