"""The verb that serves a run; it imports what it needs inside, so that `chatsae --help` answers at once."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from chatsae.errors import UserError
from chatsae.typed import Count, Flags, Number, Positive, Words


@dataclass
class Serve(Flags):
    """Serve a run's model as an OpenAI-compatible chat endpoint, with steering per request (docs/serve.md).

    POST /v1/chat/completions (streams, and the field steering), GET /v1/models, GET and POST /v1/features, /health.
    SIGTERM and Ctrl-C end it with exit code 0. Needs chatsae[serve].
    """

    run: tyro.conf.Positional[Path]
    """Run directory; its SAEs are addressed by name."""
    host: Words = "127.0.0.1"
    """Address to listen on; one that other machines can reach needs --api-key-env."""
    port: Annotated[int, Number(least=0, most=65535)] = 8000
    """0: any free one."""
    api_key_env: str | None = None
    """Environment variable that holds the key that clients must send (Authorization: Bearer KEY)."""
    max_tokens: Count = 1024
    """Tokens of an answer at most."""
    context: Count = 8192
    """Tokens of messages and answer at most, where the model does not have fewer."""
    batch: Count = 64
    """Answers that are computed together at most."""
    requests: Count = 128
    """Requests under way and waiting at most; one more gets 429."""
    body_bytes: Count = 1 << 20
    """Bytes of a request's body at most (413)."""
    body_seconds: Positive = 10.0
    """Seconds in which the headers, and the body, must come (408)."""
    margin: Annotated[float, Number(least=0)] | None = None
    """Where a token leads by less than this in logits, its row is read again alone, so that answers do not depend on
    the others; by default measured. 0: never."""
    grace: Annotated[float, Number(least=0)] = 10.0
    """Seconds that answers have to end when the server is told to stop."""
    json: bool = False
    """Print the address and the SAEs as JSON on stdout as well."""

    def __call__(self) -> None:
        try:
            from chatsae.serve.server import Options, serve_run
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("chatsae"):
                raise
            raise UserError(f"serving needs {error.name}: pip install 'chatsae[serve]'") from None
        serve_run(self.run, Options(**{each.name: getattr(self, each.name) for each in fields(Options)}))
