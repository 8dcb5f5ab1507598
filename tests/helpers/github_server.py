"""GitHub's API over HTTP, as far as comments on a pull request go."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass
class GitHub:
    """
    A repository's comments. A request without the right token is 401; `status`, where set, answers all others. The token is a
    workflow's, or that of the user `login`.
    """

    token: str = "a-token"
    url: str = ""
    status: int | None = None
    login: str | None = None
    comments: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def add(self, body: str | None, kind: str = "Bot", login: str = "github-actions[bot]") -> dict[str, Any]:
        number = len(self.comments) + 1
        self.comments.append(
            {
                "id": number,
                "body": body,
                "user": {"type": kind, "login": login},
                "html_url": f"{self.url}/c/{number}",
            }
        )
        return self.comments[-1]

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> tuple[int, Any]:
        if method == "PATCH" and (match := re.fullmatch(r"/repos/me/model/issues/comments/(\d+)", path)):
            one = self.comments[int(match[1]) - 1]
            one["body"] = body["body"]
            return 200, one
        if path == "/user":  # GitHub: "Resource not accessible by integration"
            return (403, {}) if self.login is None else (200, {"login": self.login})
        if path != "/repos/me/model/issues/12/comments":
            return 404, {"message": "Not Found"}
        if method == "POST":
            return 201, self.add(body["body"]) if self.login is None else self.add(body["body"], "User", self.login)
        size, page = int(query["per_page"][0]), int(query["page"][0])
        return 200, self.comments[size * (page - 1) : size * page]


@contextmanager
def serving() -> Iterator[GitHub]:
    github = GitHub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            url = urlsplit(self.path)
            github.asked.append(f"{self.command} {url.path}")
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
            status, answer = github.status or 200, {}
            if self.headers["Authorization"] != f"Bearer {github.token}":
                status = 401
            elif github.status is None:
                status, answer = github.answer(self.command, url.path, parse_qs(url.query), body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = handle_any

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        github.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield github
        server.shutdown()
