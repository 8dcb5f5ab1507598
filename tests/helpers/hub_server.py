"""
A local Hugging Face Hub in memory, over real HTTP: what the client needs to create, push, read and gate repos.

It speaks the LFS path, not Xet: clients set `HF_HUB_DISABLE_XET=1`. Not imitated: the full card rules, redirects to a
CDN, multipart uploads, paging, the dataset viewer. `python -m tests.helpers.hub_server PORT` runs it alone.
"""

import asyncio
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import unquote

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.helpers.hub_endpoints import RIGHTS, Ask, Endpoints
from tests.helpers.hub_store import Kind, Refusal, Repo


_REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+(?:/[^/]+)?)"  # one segment: a legacy id like "gpt2"
_FILES = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+|[^/]+)"
# (endpoint, method, path as sent: a revision like refs%2Fpr%2F1 is one segment until it is decoded). The first wins.
ENDPOINTS = [
    ("telemetry", "HEAD|GET", r"/api/(?:telemetry|agent-harnesses).*"),
    ("whoami", "GET", r"/api/whoami-v2"),
    ("validate-yaml", "POST", r"/api/validate-yaml"),
    ("create", "POST", r"/api/repos/create"),
    ("delete", "DELETE", r"/api/repos/delete"),
    ("lfs-put", "PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})"),
    ("lfs-verify", "POST", r"/_lfs/verify"),
    ("lfs-batch", "POST", _FILES + r"\.git/info/lfs/objects/batch"),
    ("preupload", "POST", _REPO + r"/preupload/(?P<rev>[^/]+)"),
    ("commit", "POST", _REPO + r"/commit/(?P<rev>[^/]+)"),
    ("commits", "GET", _REPO + r"/commits/(?P<rev>[^/]+)"),
    ("tree", "GET", _REPO + r"/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?"),
    ("paths-info", "POST", _REPO + r"/paths-info/(?P<rev>[^/]+)"),
    ("refs", "GET", _REPO + r"/refs"),
    ("branch", "POST", _REPO + r"/branch/(?P<rev>[^/]+)"),
    ("tag", "POST", _REPO + r"/tag/(?P<rev>[^/]+)"),
    ("variables", "GET|POST|DELETE", _REPO + r"/variables"),
    ("settings", "PUT", _REPO + r"/settings"),
    ("auth-check", "GET", _REPO + r"/auth-check(?:/(?P<path>write))?"),
    ("info", "GET", _REPO + r"(?:/revision/(?P<rev>[^/]+))?"),
    ("resolve", "HEAD|GET", _FILES + r"/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
]
ROUTES = [(name, re.compile(f"(?:{method}) {path}")) for name, method, path in ENDPOINTS]
# (X-Error-Code, message) of injected answers, as the real Hub gives them.
REASONS = {
    401: ("", "Invalid credentials in Authorization header"),
    402: ("", "You need a PRO subscription for this"),
    403: ("", RIGHTS),
    404: ("RepoNotFound", "Repository not found"),
    409: ("", "A conflicting commit is in progress"),
    412: ("", "A commit has happened since. Please refresh and try again"),
    429: ("", "We had to rate limit you"),
}


@dataclass
class Fault:
    what: int | str
    times: int
    match: str
    seconds: float
    after: bool


@dataclass(frozen=True)
class Call:
    """One request that arrived; `user` is None without a token, `status` 0 for a dropped connection."""

    endpoint: str
    method: str
    path: str
    user: str | None
    status: int


class _Protocol(H11Protocol):
    """Remembers each connection's transport: an ASGI application has no way to cut its connection."""

    transports: ClassVar[dict[tuple, asyncio.Transport]] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transports[transport.get_extra_info("peername")[:2]] = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.transports.pop(self.transport.get_extra_info("peername")[:2], None)
        super().connection_lost(exc)


class LocalHub(Endpoints):
    """
    The server: `start()`, `stop()`, `url`, `token` (alice's; `tokens` has everyone's), `repo(id)`, `log`, `fail_next`.
    """

    def __init__(self) -> None:
        self.url = ""
        self.reset()

    def reset(self) -> None:
        """Forget repos, uploads, requests and faults; the address stays."""
        self.tokens = {"hf_alice": "alice", "hf_bob": "bob"}
        self.token = "hf_alice"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.log: list[Call] = []
        self.faults: list[Fault] = []

    def repo(self, id: str, kind: Kind = "models") -> Repo:
        return self.repos[kind, id]

    def calls(self, endpoint: str) -> list[Call]:
        return [call for call in self.log if call.endpoint == endpoint]

    def fail_next(
        self, status: int | str, times: int = 1, match: str = "commit", seconds: float = 1.0, after: bool = False
    ) -> None:
        """
        Spoil the next requests to the endpoint `match` (a name of `ENDPOINTS`, or a pattern of "METHOD /path" if it
        holds a slash). `status` is a number, "drop" (the connection) or "slow" (right, `seconds` late). With
        `after` the request takes effect and only its answer is lost.
        """
        if "/" not in match and match not in (name for name, _ in ROUTES):
            raise ValueError(f"No endpoint is named {match!r}")
        self.faults.append(Fault(status, times, match, seconds, after))

    def start(self, port: int = 0) -> "LocalHub":
        listener = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        methods = ["GET", "HEAD", "POST", "PUT", "DELETE"]
        app = Starlette(routes=[Route("/{path:path}", self._handle, methods=methods)])
        config = uvicorn.Config(
            app, http=_Protocol, loop="asyncio", ws="none", lifespan="off", log_level="error", access_log=False
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)
        return self

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True  # a slow answer is not waited for
        self._thread.join(10)

    async def _handle(self, request: Request) -> Response:
        body = await request.body()
        path = request.scope["raw_path"].decode()
        line = f"{request.method} {path}"
        found = ((name, match) for name, pattern in ROUTES if (match := pattern.fullmatch(line)))
        name, match = next(found, ("unknown", None))
        user = self.tokens.get(token := request.headers.get("authorization", "").removeprefix("Bearer "))
        fault = self._fault(name, line)
        try:
            if fault and fault.what == "slow":
                await asyncio.sleep(fault.seconds)
                fault = None
            response = None
            if fault is None or fault.after:
                if token and user is None:
                    raise Refusal(401, *REASONS[401])
                if match is None:  # loud: a test that gets here needs an endpoint that is not written yet
                    raise Refusal(501, "", f"The local Hub does not know {line}")
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value}
                handler: Callable[[Ask], Response | dict | list] = getattr(self, name.replace("-", "_"))
                answer = handler(Ask(user, request.query_params, request.headers, body, **parts))
                response = answer if isinstance(answer, Response) else JSONResponse(answer)
            if fault and isinstance(fault.what, int):
                raise Refusal(fault.what, *REASONS.get(fault.what, ("", "Internal Error")))
            if fault or response is None:
                self.log.append(Call(name, request.method, path, user, 0))
                return await self._drop(request)
        except Refusal as refusal:
            response = JSONResponse(refusal.body, refusal.status, headers=refusal.headers)
        self.log.append(Call(name, request.method, path, user, response.status_code))
        return response

    def _fault(self, name: str, line: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and (re.search(fault.match, line) if "/" in fault.match else fault.match == name):
                fault.times -= 1
                return fault
        return None

    async def _drop(self, request: Request) -> Response:
        _Protocol.transports[tuple(request.scope["client"])].abort()
        while not await request.is_disconnected():
            await asyncio.sleep(0.005)
        return Response()


if __name__ == "__main__":
    hub = LocalHub().start(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    sys.stdout.write(f"{hub.url} (tokens: {', '.join(hub.tokens)})\n")
    sys.stdout.flush()
    threading.Event().wait()
