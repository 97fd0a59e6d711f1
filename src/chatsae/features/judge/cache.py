"""Answers that were given once: an SQLite file to which answers are only added, and a client that reads one."""

import json
import sqlite3
import threading
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from chatsae.errors import UserError
from chatsae.features.judge.client import Answer, NotRecordedError, Request, canonical

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, model TEXT NOT NULL, request TEXT NOT NULL,
    answer TEXT NOT NULL, at TEXT NOT NULL) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON answers BEGIN SELECT RAISE(ABORT, 'answers are kept'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON answers BEGIN SELECT RAISE(ABORT, 'answers are kept'); END;
"""


class Cache:
    """Answers by the key of their request; each is on the disk when `put` returns.

    Raises:
        UserError: the file cannot be opened, or is no such file.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            if read_only:
                self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)
                self._db.execute("SELECT 1 FROM answers LIMIT 1")
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._db = sqlite3.connect(path, timeout=60, check_same_thread=False)
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{path} cannot be read as recorded answers: {error}") from None

    def get(self, key: str) -> Answer | None:
        """The answer to a request, if there is one."""
        with self._lock:
            row = self._db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Answer(**json.loads(row[0]))

    def put(self, model: str, request: Request, answer: Answer) -> None:
        """Keep an answer; one that is there already stays.

        Raises:
            UserError: it cannot be written.
        """
        row = (
            request.key(model),
            model,
            canonical(request.facts(model)),
            canonical(asdict(answer)),
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            with self._lock, self._db:
                self._db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise UserError(f"{self.path} cannot be written: {error}") from None

    def models(self) -> list[str]:
        """The models that answered."""
        with self._lock:
            return [row[0] for row in self._db.execute("SELECT DISTINCT model FROM answers ORDER BY model")]

    def __len__(self) -> int:
        with self._lock:
            return self._db.execute("SELECT count(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


class Replay:
    """The recorded answers of a model, without a network.

    Raises:
        UserError: there is no such record, or it has answers of several models and none is named.
    """

    def __init__(self, path: Path, model: str | None = None) -> None:
        if not path.is_file():
            raise UserError(f"--judge replay: {path} does not exist; judges record into RUN/judge/cache.sqlite")
        self._cache = Cache(path, read_only=True)
        models = self._cache.models()
        if model is None and len(models) != 1:
            raise UserError(f"{path} has answers of {len(models)} models ({', '.join(models)}); name one with --model")
        if model is not None and model not in models:
            raise UserError(f"{path} has no answers of {model!r}; it has those of {', '.join(models) or 'no model'}")
        self.model = model or models[0]

    def complete(self, request: Request) -> Answer:
        """The recorded answer.

        Raises:
            NotRecordedError: this was never asked.
        """
        answer = self._cache.get(request.key(self.model))
        if answer is None:
            raise NotRecordedError(
                f"{self._cache.path} has no answer of {self.model} to one of these requests; "
                "it was recorded of other features, contexts or options"
            )
        return answer

    def stop(self) -> None:
        """Nothing is ever under way."""

    def close(self) -> None:
        """Close the record."""
        self._cache.close()
