"""The local Hub's answers, one method per endpoint of `hub_server.ENDPOINTS`."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import JSONResponse, Response

from tests.helpers.hub_store import BINARY, Blob, Refusal, Repo, card_errors, folder_entry, front_matter


RIGHTS = "You don't have the rights to do this"


@dataclass(frozen=True)
class Ask:
    """One request: who asks (`user` is None without a token), the parts of the path, query, headers, body."""

    user: str | None
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    kind: str = "models"
    repo: str = ""
    rev: str = "main"  # of the branch endpoint: the new branch
    path: str = ""
    oid: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")


class Endpoints:
    """What a `LocalHub` answers when nothing is injected; a `Refusal` is raised."""

    url: str
    repos: dict[tuple[str, str], Repo]
    lfs: dict[str, bytes]

    def find(self, ask: Ask, write: bool = False, gate: bool = False) -> Repo:
        repo = self.repos.get((ask.kind, ask.repo))
        if repo is None or (repo.private and repo.owner != ask.user):
            # With https the client takes any 401 for a missing repo; with http it needs the code.
            raise Refusal(404 if ask.user else 401, "RepoNotFound", "Repository not found")
        if write and repo.owner != ask.user:
            raise Refusal(403 if ask.user else 401, "", RIGHTS)
        if gate and repo.gated and ask.user not in {repo.owner, *repo.granted}:
            raise Refusal(403 if ask.user else 401, "GatedRepo", f"Access to {repo.id} is restricted")
        return repo

    def page(self, repo: Repo) -> str:
        return f"{self.url}/{'' if repo.kind == 'models' else repo.kind + '/'}{repo.id}"

    def telemetry(self, ask: Ask) -> dict:
        return {"standardEnvVars": [], "harnesses": {}}

    def whoami(self, ask: Ask) -> dict:
        if ask.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        token = {"displayName": "test", "role": "write", "createdAt": "2026-01-01T00:00:00.000Z"}
        auth = {"type": "access_token", "accessToken": token}
        return dict(type="user", id=ask.user, name=ask.user, fullname=ask.user.title(), orgs=[], auth=auth)

    def validate_yaml(self, ask: Ask) -> dict:
        errors = card_errors(ask.json["content"])
        if errors:
            raise Refusal(400, "", "", errors=[{"message": message} for message in errors], warnings=[])
        return {"errors": [], "warnings": []}

    def create(self, ask: Ask) -> dict:
        asked = ask.json
        if ask.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        if (asked.get("organization") or ask.user) != ask.user:
            raise Refusal(403, "", "You don't have the rights to create a model under this namespace")
        kind = (asked.get("type") or "model") + "s"
        if kind == "spaces" and not asked.get("sdk"):
            raise Refusal(400, "", "A Space needs an sdk")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = Repo(kind, f"{ask.user}/{asked['name']}", private, asked.get("sdk"))
        if (kind, repo.id) in self.repos:  # the client reads the address from here when exist_ok
            raise Refusal(409, "", "You already created this repo", url=self.page(repo))
        self.repos[kind, repo.id] = repo
        return {"url": self.page(repo), "name": repo.id}

    def delete(self, ask: Ask) -> dict:
        asked = ask.json
        id = f"{asked.get('organization') or ask.user}/{asked['name']}"
        repo = self.find(replace(ask, kind=(asked.get("type") or "model") + "s", repo=id), write=True)
        del self.repos[repo.kind, repo.id]
        return {}

    def preupload(self, ask: Ask) -> dict:
        found = self.find(ask, write="create_pr" not in ask.query)
        held = found.resolve(ask.rev).files
        files = []
        for file in ask.json["files"]:
            binary = file["path"].endswith(BINARY) or b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if file["size"] and (binary or file["size"] > 10 << 20) else "regular"
            oid = {"oid": held[file["path"]].etag} if file["path"] in held else {}
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return {"files": files, "commitOid": found.resolve(ask.rev).sha}

    def lfs_batch(self, ask: Ask) -> dict:
        self.find(ask)
        objects = [{"oid": item["oid"], "size": item["size"]} for item in ask.json["objects"]]
        for item in objects:
            if item["oid"] not in self.lfs:  # without actions: already stored
                upload, verify = {"href": f"{self.url}/_lfs/{item['oid']}"}, {"href": f"{self.url}/_lfs/verify"}
                item["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, ask: Ask) -> dict:
        if hashlib.sha256(ask.body).hexdigest() != ask.oid:
            raise Refusal(400, "", "The bytes do not have the sha256 of their address")
        self.lfs[ask.oid] = ask.body
        return {}

    def lfs_verify(self, ask: Ask) -> dict:
        asked = ask.json
        if len(self.lfs.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "", "No such object")
        return {}

    def commit(self, ask: Ask) -> dict:
        as_pr = "create_pr" in ask.query
        found = self.find(ask, write=not as_pr)
        head = found.resolve(ask.rev)
        lines = [json.loads(line) for line in ask.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head.sha):
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again")
        files, uploads = dict(head.files), {}
        for operation in lines[1:]:
            value = operation["value"]
            path = value["path"]
            if operation["key"] == "file":
                files[path], uploads[path] = Blob(base64.b64decode(value["content"]), False), "regular"
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise Refusal(400, "", f"{path} was not uploaded")
                files[path], uploads[path] = Blob(self.lfs[value["oid"]], True), "lfs"
            elif operation["key"] == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refusal(404, "EntryNotFound", f"{path} does not exist")
            else:  # deletedFolder
                files = {name: blob for name, blob in files.items() if not name.startswith(path.rstrip("/") + "/")}
        number = len(found.refs["pr"]) + 1
        ref = f"refs/pr/{number}" if as_pr else ask.rev if ask.rev.startswith("refs/") else f"refs/heads/{ask.rev}"
        commit = found.add(
            ref,
            header["summary"],
            files,
            uploads,
            parent=head.sha,
            message=header.get("description", ""),
            author=ask.user,
        )
        pull = {"pullRequestUrl": f"{self.page(found)}/discussions/{number}"} if as_pr else {}
        return {"commitUrl": f"{self.page(found)}/commit/{commit.sha}", "commitOid": commit.sha, **pull}

    def commits(self, ask: Ask) -> list:
        history = self.find(ask).history(ask.rev)
        rows = [dict(id=c.sha, title=c.title, message=c.message, date=c.date) for c in history]
        return [row | {"authors": [{"user": c.author}]} for row, c in zip(rows, history, strict=True)]

    def tree(self, ask: Ask) -> list:
        files = self.find(ask).resolve(ask.rev).files
        prefix = f"{ask.path.strip('/')}/" if ask.path else ""
        below = {name: blob for name, blob in files.items() if name.startswith(prefix)}
        if not below:
            raise Refusal(404, "EntryNotFound", f"{ask.path} does not exist on {ask.rev}")
        deep = ask.query.get("recursive", "").lower() in ("true", "1")
        folders = {name[:i] for name in below for i, c in enumerate(name) if c == "/" and i >= len(prefix)}
        entries = [folder_entry(name) for name in folders] + [blob.entry(name) for name, blob in below.items()]
        shown = [entry for entry in entries if deep or "/" not in entry["path"][len(prefix) :]]
        return sorted(shown, key=lambda entry: entry["path"])

    def paths_info(self, ask: Ask) -> list:
        files = self.find(ask).resolve(ask.rev).files
        asked = [path.strip("/") for path in parse_qs(ask.body.decode()).get("paths", [])]
        found = [files[path].entry(path) for path in asked if path in files]
        return found + [folder_entry(path) for path in asked if any(name.startswith(path + "/") for name in files)]

    def refs(self, ask: Ask) -> dict:
        answer: dict[str, list] = {"converts": []}
        for key, ref in (("branches", "heads"), ("tags", "tags"), ("pullRequests", "pr")):
            names = self.find(ask).refs[ref].items()
            answer[key] = [{"name": name, "ref": f"refs/{ref}/{name}", "targetCommit": sha} for name, sha in names]
        return answer

    def branch(self, ask: Ask) -> dict:
        return self._point(ask, "heads", ask.rev, ask.json.get("startingPoint", "main"))

    def tag(self, ask: Ask) -> dict:
        return self._point(ask, "tags", ask.json["tag"], ask.rev)

    def _point(self, ask: Ask, ref: str, name: str, revision: str) -> dict:
        found = self.find(ask, write=True)
        if name in found.refs[ref]:
            raise Refusal(409, "", f"Reference {name} already exists")
        found.refs[ref][name] = found.resolve(revision).sha
        return {}

    def settings(self, ask: Ask) -> dict:
        found, asked = self.find(ask, write=True), ask.json
        found.private = asked.get("visibility", "private" if found.private else "public") == "private"
        found.gated = asked.get("gated", found.gated)
        return {}

    def variables(self, ask: Ask) -> dict:
        found = self.find(ask, write=True)  # public in the page, yet the API is for those who may write
        if ask.body:
            asked = ask.json
            if "value" in asked:
                found.variables[asked["key"]] = asked["value"]
            else:
                found.variables.pop(asked["key"], None)
        return {key: {"value": value} for key, value in found.variables.items()}

    def auth_check(self, ask: Ask) -> dict:
        self.find(ask, write=ask.path == "write", gate=True)
        return {}

    def info(self, ask: Ask) -> dict:
        found = self.find(ask)
        commit, first = found.resolve(ask.rev), found.history(ask.rev)[-1]
        siblings = []
        for path, blob in sorted(commit.files.items()):
            lfs = {"lfs": {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": 132}} if blob.lfs else {}
            siblings.append({"rfilename": path, "size": len(blob.data), "blobId": blob.oid, **lfs})
        card = front_matter(commit.files["README.md"].data.decode()) if "README.md" in commit.files else {}
        answer = dict(_id=found.id, id=found.id, author=found.owner, sha=commit.sha, createdAt=first.date)
        answer |= dict(lastModified=commit.date, private=found.private, gated=found.gated, disabled=False)
        answer |= dict(downloads=0, likes=0, tags=card.get("tags") or [], cardData=card, siblings=siblings)
        if ask.kind == "models":
            answer |= dict(library_name=card.get("library_name"), pipeline_tag=card.get("pipeline_tag"))
        return answer | ({"sdk": found.sdk} if ask.kind == "spaces" else {})

    def resolve(self, ask: Ask) -> Response:
        commit = self.find(ask, gate=True).resolve(ask.rev)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if ask.path not in commit.files:
            refusal = Refusal(404, "EntryNotFound", "Entry not found")
            return JSONResponse(refusal.body, 404, headers=headers | refusal.headers)
        blob = commit.files[ask.path]
        headers["ETag"] = f'"{blob.etag}"'
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        data, status = blob.data, 200
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", ask.headers.get("range", "")):
            start, stop = int(part[1]), min(int(part[2] or len(data)), len(data) - 1) + 1
            if start >= len(data):
                raise Refusal(416, "", "Range Not Satisfiable")
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        return Response(data, status, headers=headers, media_type="application/octet-stream")
