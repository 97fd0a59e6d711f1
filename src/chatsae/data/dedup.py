"""The paper's greedy n-gram deduplication."""

from collections import Counter
from collections.abc import Iterable, Iterator

from chatsae.batch import Dialogue
from chatsae.errors import UserError


def ngrams(dialogue: Dialogue, n: int) -> set[tuple[str, ...]]:
    """Every window of n whitespace words within one turn; a turn of fewer words has none."""
    turns = [message.content.split() for message in dialogue.messages]
    return {tuple(words[i : i + n]) for words in turns for i in range(len(words) - n + 1)}


def dedup(dialogues: Iterable[Dialogue], *, ngram: int = 20, tally: Counter[str] | None = None) -> Iterator[Dialogue]:
    """The dialogues that share no n-gram with an earlier kept one, in order (the paper's Algorithm 1).

    The n-grams of a dropped dialogue are not remembered. The seen ones are held as 64-bit hashes (about 86 bytes
    each), so that memory grows with what is kept. `ngram=0` passes everything on. Drops are counted in `tally`.

    Raises:
        UserError: ngram is negative.
    """
    if ngram < 0:
        raise UserError(f"data.ngram: expected 0 (off) or a number of words, got {ngram}")
    return iter(dialogues) if ngram == 0 else _greedy(dialogues, ngram, tally)


def _greedy(dialogues: Iterable[Dialogue], n: int, tally: Counter[str] | None) -> Iterator[Dialogue]:
    seen: set[int] = set()
    for dialogue in dialogues:
        hashes = {hash(window) for window in ngrams(dialogue, n)}
        if seen.isdisjoint(hashes):
            seen |= hashes
            yield dialogue
        elif tally is not None:
            tally[f"shares {n} words in a row with an earlier dialogue"] += 1
