"""A small OpenAI-compatible server over real HTTP, with models that answer by rule and faults on demand."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


REFUSAL, COMPLIANCE = "I'm sorry, but I can't help with that.", "Sure, here is how: mix, wait and stir well."
PAGE = "<!doctype html><title>Bad gateway</title>"
Rule = Callable[[str], str | dict[str, Any]]  # of a prompt's text: an answer, or a whole choice


class Call(NamedTuple):
    """A request that arrived."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]


class ChatServer(ThreadingHTTPServer):
    """
    `url`, `calls` (requests for answers), `models` (a rule by id), `faults` (what the next answers are spoiled by):

    a status, "drop" (the connection), "slow" (after `seconds`), "garbage" (no JSON), "page" (HTML), "empty" (JSON without a
    choice), or `(429, "2")` with a Retry-After.
    """

    daemon_threads = True

    def __init__(self, models: dict[str, Rule]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.models, self.faults, self.calls = models, [], []  # type: ignore[var-annotated]
        self.key: str | None = None
        self.seconds, self.busiest, self._busy, self.lock = 2.0, 0, 0, threading.Lock()
        self.owner, self.listed = "vllm", True

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        yield
        with self.lock:
            self._busy -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if not self._allowed():
            return
        if self.path != "/v1/models" or not self.server.listed:
            self._say(404, PAGE, "text/html")
            return
        data = [{"id": name, "object": "model", "owned_by": self.server.owner} for name in self.server.models]
        self._say(200, json.dumps({"object": "list", "data": data}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        with self.server.lock:
            self.server.calls.append(Call(self.path, body, dict(self.headers)))
            fault = self.server.faults.pop(0) if self.server.faults else None
        with self.server.counted():
            time.sleep(0.01)
            self._answer(body, fault)

    def _answer(self, body: dict[str, Any], fault: Any) -> None:
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "garbage":
            self._say(200, '{"choices": [{"mess')
        elif fault == "page":
            self._say(200, PAGE, "text/html")
        elif fault == "empty":
            self._say(200, '{"choices": []}')
        elif isinstance(fault, tuple):
            self._say(fault[0], "{}", retry_after=fault[1])
        elif isinstance(fault, int):
            self._say(fault, json.dumps({"error": {"message": f"it is ill; your key {self.server.key} is fine."}}))
        else:
            if fault == "slow":
                time.sleep(self.server.seconds)
            chat = self.path == "/v1/chat/completions"
            said = self.server.models[body["model"]](body["messages"][-1]["content"] if chat else body["prompt"])
            choice = {"finish_reason": "stop"} | (said if isinstance(said, dict) else {})
            if isinstance(said, str):
                choice |= {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
            self._say(200, json.dumps({"choices": [choice]}))

    def _allowed(self) -> bool:
        if self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return True
        self._say(401, json.dumps({"error": {"message": f"wrong key: {self.headers.get('Authorization')}"}}))
        return False

    def _say(self, status: int, text: str, kind: str = "application/json", retry_after: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(text.encode())


@contextmanager
def chat_server(**models: Rule) -> Iterator[ChatServer]:
    """The server, while it is needed."""
    server = ChatServer(models)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
