"""A server on this machine for Neuronpedia's own client."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest


class Neuronpedia(HTTPServer):
    """A server on this machine that keeps what the client posts, and answers a GET with what it has been given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from neuronpedia.requests.base_request import NPRequest

        self.got: list[tuple[str, Any]] = []
        self.answers: dict[str, Any] = {}
        super().__init__(("127.0.0.1", 0), _Handler)
        monkeypatch.setattr(NPRequest, "BASE_URL", f"http://127.0.0.1:{self.server_port}/api")
        monkeypatch.setenv("NEURONPEDIA_API_KEY", "none")

    def __enter__(self) -> "Neuronpedia":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Neuronpedia

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.got.append((self.path, body))
        self._answer(self.server.answers.get(self.path, {}))

    def do_GET(self) -> None:
        self._answer(self.server.answers[self.path])

    def _answer(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass
