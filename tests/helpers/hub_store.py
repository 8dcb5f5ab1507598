"""Repos of the local Hub in memory: files, commits, branches, and who may see them. `hub_server.py` serves them."""

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import yaml


Kind = Literal["models", "datasets", "spaces"]
BINARY = (
    ".safetensors",
    ".bin",
    ".pt",
    ".parquet",
    ".arrow",
    ".gz",
    ".zip",
    ".png",
)  # git-lfs by the real .gitattributes
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in BINARY).encode()


class Refusal(Exception):
    """An answer other than success; `X-Error-Code` is what the client makes its exception class of."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: Any):
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        if status == 429:
            headers["RateLimit"] = '"api";r=0;t=1'
        self.headers = {key: value for key, value in headers.items() if value}
        self.status, self.body = status, {"error": message, **body}


@dataclass(frozen=True)
class Blob:
    """A file's bytes, and whether they came by LFS."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """Git's name of the blob; of an LFS file, that of its pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        data = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def entry(self, path: str) -> dict:
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.data), "pointerSize": 132}} if self.lfs else {}
        return {"type": "file", "path": path, "oid": self.oid, "size": len(self.data), **lfs}


@dataclass(frozen=True)
class Commit:
    """All files of the repo after one commit, and how those it brought came: `uploads[path]` is "regular" or "lfs"."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    files: dict[str, Blob]
    uploads: dict[str, str]
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


class Repo:
    """A repo with its whole history: `refs` by kind, every commit by sha."""

    def __init__(self, kind: Kind, id: str, private: bool = False, sdk: str | None = None):
        self.kind, self.id, self.private, self.sdk = kind, id, private, sdk
        self.owner = id.split("/")[0]
        self.gated: str | Literal[False] = False
        self.variables: dict[str, str] = {}  # of a Space
        self.granted: set[str] = set()  # users let in by the gate, besides the owner
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, dict[str, str]] = {"heads": {}, "tags": {}, "pr": {}}
        self.add("refs/heads/main", "initial commit", {".gitattributes": Blob(GIT_ATTRIBUTES, False)}, {})

    def resolve(self, revision: str = "main") -> Commit:
        kind, _, name = revision.removeprefix("refs/").partition("/")
        named = [self.refs["heads"].get(revision), self.refs["tags"].get(revision), self.refs.get(kind, {}).get(name)]
        sha = next(filter(None, named), revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of a revision, newest first."""
        chain = [self.resolve(revision)]
        while chain[-1].parent:
            chain.append(self.commits[chain[-1].parent])
        return chain

    def read(self, path: str, revision: str = "main") -> bytes:
        return self.resolve(revision).files[path].data

    def add(self, ref: str, title: str, files: dict[str, Blob], uploads: dict[str, str], **more: str) -> Commit:
        _, kind, name = ref.split("/", 2)
        # Random rather than derived: clients cache listings by sha, and a push after a reset must not meet them.
        commit = Commit(
            secrets.token_hex(20),
            more.get("parent"),
            title,
            more.get("message", ""),
            more.get("author", self.owner),
            files,
            uploads,
        )
        self.commits[commit.sha] = commit
        self.refs[kind][name] = commit.sha
        return commit


def folder_entry(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


def front_matter(card: str) -> dict:
    """The metadata of a card; empty if there is none or it is not a mapping."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", card, re.DOTALL)
    values = yaml.safe_load(found[1]) if found else {}
    return values if isinstance(values, dict) else {}


def card_errors(card: str) -> list[str]:
    """A few of the real Hub's rules: the metadata parses, and names of models and datasets look like ids."""
    try:
        values = front_matter(card)
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    errors = []
    for key in ("base_model", "datasets"):
        names = values.get(key) or []
        for name in [names] if isinstance(names, str) else names:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
                errors.append(f'"{key}" with value "{name}" is not valid')
    if not isinstance(values.get("license", ""), str | list):
        errors.append('"license" must be a string')
    return errors
