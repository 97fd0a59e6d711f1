"""`chatsae features`: one question about the features of a run, answered for people and for programs."""

from pathlib import Path
from typing import Any

from chatsae import console
from chatsae.errors import UserError
from chatsae.features import lookup, show
from chatsae.features.build import check_index
from chatsae.features.collect import Reading
from chatsae.features.session import Ask, RunFeatures, describe


def look(
    path: Path,
    ask: Ask,
    *,
    saes: tuple[str, ...] = (),
    token: str | None = None,
    text: str | None = None,
    raw: bool = False,
    like: int | None = None,
    rows: int = 20,
) -> tuple[dict[str, Any], str]:
    """The answer as JSON holds it, by SAE, and as text tables. At most one of token, text and like is asked.

    Raises:
        UserError: see `RunFeatures` and the functions of `lookup`.
    """
    asked = [flag for flag, value in (("--token", token), ("--text", text), ("--like", like)) if value is not None]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} are different questions; ask one at a time")
    if raw and text is None:
        raise UserError("--raw says how --text is read; give a --text")
    if rows < 1:
        raise UserError(f"--rows must be at least 1, not {rows}")
    run = RunFeatures(path, saes)
    for sae in run.saes.values():
        check_index(sae, *ask.only, *(() if like is None else (like,)))
    if text is not None:
        fired = lookup.on_text(run.saes, run.lm, text, run.reading, raw=raw)
        return fired, "\n\n".join(show.text_table(name, found) for name, found in fired.items())
    token_id = None if token is None else lookup.token_id(run.lm.tokenizer, token)
    stores = run.stores(ask)
    for store in stores.values():
        console.say(describe(store))
    if like is not None:
        near = {name: lookup.like(store, run.saes[name], like) for name, store in stores.items()}
        return near, "\n\n".join(show.like_tables(name, like, found) for name, found in near.items())
    if token is not None and token_id is not None:
        facts = next(iter(stores.values())).facts
        tokens, reading = run.tokens(facts["dialogues_asked"]), Reading(**facts["reading"])
        ranked = lookup.by_token(stores, run.saes, run.lm, tokens, token_id, reading, rows=rows)
        return ranked, "\n\n".join(show.token_table(name, token, found) for name, found in ranked.items())
    found = {name: {"facts": s.facts, "features": show.feature_rows(s, ask.only)} for name, s in stores.items()}
    return found, "\n\n".join(show.feature_table(store, ask.only, rows) for store in stores.values())
