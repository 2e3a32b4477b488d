"""A small Hub on the loopback interface: the part of its protocol that huggingface_hub pushes and reads models with.

It has users with tokens, public and private repositories with branches of commits, uploads of large files (Git LFS),
and commits that are made as a whole or not at all. Tests can cut connections in the middle of an upload, or hold them.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "other"}
CHUNK = 2**14


@dataclass
class Commit:
    """A version of a repository; `files` holds, by path, contents or the SHA-256 of an LFS object."""

    sha: str
    message: str
    files: dict[str, bytes | str]
    parent: str | None


@dataclass
class Repo:
    """A repository with its commits by hash, and the newest commit of each branch."""

    private: bool
    owner: str
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, message: str, files: dict[str, bytes | str]) -> Commit:
        parent = self.branches.get(branch)
        text = json.dumps([parent, message, len(self.commits), sorted(files)])
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), message, files, parent)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit

    def find(self, revision: str) -> Commit | None:
        """Return a commit by its hash or branch."""
        return self.commits.get(self.branches.get(revision, revision))

    def history(self, branch: str = "main") -> list[str]:
        """Return the messages of a branch's commits, newest first."""
        messages, sha = [], self.branches.get(branch)
        while sha:
            messages.append(self.commits[sha].message)
            sha = self.commits[sha].parent
        return messages


class RefusedError(Exception):
    """An error that the Hub answers a request with."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """A Hub that runs in a thread.

    Args:
        tokens: Names of users, by their tokens.

    Attributes:
        requests: Method, path and status of all answered requests, in order.
        uploads: SHA-256 of each LFS upload that began, in order, and the number of its bytes that have arrived.
        cut: Called with the SHA-256 of an upload and the number of its bytes that have arrived; the connection is cut
            when it returns True.
        hold: While it is set, uploads stop half-way, and are lost in the end; `held` is set when one has stopped.
    """

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.uploads: list[tuple[str, int]] = []
        self.cut: Callable[[str, int], bool] = lambda sha, arrived: False
        self.hold, self.held = threading.Event(), threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.storage = f"http://localhost:{self.http.server_address[1]}"  # as on the Hub, another host has LFS objects
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def contents(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the contents of the files of a version, by path."""
        commit = self.repos[repo_id].find(revision)
        assert commit is not None
        return {path: self.objects[file] if isinstance(file, str) else file for path, file in commit.files.items()}


class _Handler(BaseHTTPRequestHandler):
    """Handler of HTTP requests to the Hub. The methods in `ROUTES` get the request's body and the groups of the path's pattern."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        """Call the method of the route that fits the request."""
        path = unquote(urlsplit(self.path).path)
        try:
            for method, pattern, handle in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    body = b"" if "PUT" in method else self.rfile.read(int(self.headers.get("Content-Length") or 0))
                    handle(self, body, *match.groups())
                    return
            raise RefusedError(404, f"no route for {self.command} {path}")
        except RefusedError as e:
            headers = {"X-Error-Message": str(e)} | ({"X-Error-Code": e.code} if e.code else {})
            self.send(e.status, json.dumps({"error": str(e)}).encode(), headers)
        except ConnectionError:
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 (the library's names)

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.hub.requests.append((self.command, unquote(urlsplit(self.path).path), status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, record: Any, status: int = 200) -> None:
        self.send(status, json.dumps(record).encode(), {"Content-Type": "application/json"})

    def user(self, *, needed: bool = False) -> str | None:
        """Return the name of the token's user; None without a token, unless a user is needed."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.tokens and (token or needed):
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def repo(self, repo_id: str, *, write: bool = False) -> Repo:
        """Return a repository that the user may read, or write."""
        user, repo = self.user(needed=write), self.hub.repos.get(repo_id)
        if repo is None or (repo.private and user != repo.owner):
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != repo.owner:
            raise RefusedError(403, f"{user} may not write to {repo_id}")
        return repo

    def commit(self, repo_id: str, revision: str) -> Commit:
        """Return a commit of a repository that the user may read."""
        commit = self.repo(repo_id).find(revision)
        if commit is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def whoami(self, body: bytes) -> None:
        self.send_json({"type": "user", "name": self.user(needed=True), "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body: bytes) -> None:
        user, request = self.user(needed=True), json.loads(body)
        owner = request.get("organization") or user
        repo_id = f"{owner}/{request['name']}"
        if owner != user:
            raise RefusedError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        exists = repo_id in self.hub.repos
        if not exists:
            repo = self.hub.repos[repo_id] = Repo(request.get("visibility") == "private", str(owner))
            repo.add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.send_json({"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}, 409 if exists else 200)

    def branch(self, body: bytes, repo_id: str, branch: str) -> None:
        repo = self.repo(repo_id, write=True)
        repo.branches[branch] = repo.branches["main"]
        self.send_json({})

    def validate(self, body: bytes) -> None:
        """Answer whether the metadata of a model card names a known licence."""
        metadata = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        errors = [] if metadata.get("license") in LICENSES else [{"message": '"license" must be one of the known ones'}]
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        """Answer which files to upload to LFS, and the hash of each file as it is."""
        self.repo(repo_id, write=True)
        files, commit = json.loads(body)["files"], self.commit(repo_id, revision)
        answers = []
        for path in (file["path"] for file in files):
            mode = "lfs" if path.endswith((".safetensors", ".png")) else "regular"
            old = commit.files.get(path)
            blob = hashlib.sha1(b"blob %d\0" % len(old) + old).hexdigest() if isinstance(old, bytes) else old
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": blob})
        self.send_json({"files": answers})

    def batch(self, body: bytes, repo_id: str) -> None:
        """Answer where to upload the LFS objects that are missing."""
        self.repo(repo_id, write=True)
        objects = json.loads(body)["objects"]
        for each in objects:
            if each["oid"] not in self.hub.objects:
                each["actions"] = {"upload": {"href": f"{self.hub.storage}/lfs/{each['oid']}"}}
        self.send_json({"transfer": "basic", "objects": objects})

    def pieces(self) -> Iterator[bytes]:
        """Yield the request's body piece by piece, as it arrives."""
        left = int(self.headers["Content-Length"])
        while left:
            piece = self.rfile.read(min(CHUNK, left))
            if not piece:
                raise ConnectionResetError
            left -= len(piece)
            yield piece

    def upload(self, body: bytes, sha: str) -> None:
        """Receive an LFS object, unless the test cuts or holds the connection."""
        data, number = b"", len(self.hub.uploads)
        self.hub.uploads.append((sha, 0))
        for piece in self.pieces():
            data += piece
            self.hub.uploads[number] = (sha, len(data))
            if self.hub.cut(sha, len(data)):
                self.connection.close()
                raise ConnectionAbortedError
            if self.hub.hold.is_set() and len(data) > 10 * CHUNK:
                self.hub.held.set()
                while self.hub.hold.is_set():
                    threading.Event().wait(0.02)
                raise ConnectionAbortedError
        if hashlib.sha256(data).hexdigest() != sha:
            raise RefusedError(400, "the contents do not have this SHA-256")
        self.hub.objects[sha] = data
        self.send(200)

    def make_commit(self, body: bytes, repo_id: str, branch: str) -> None:
        """Add a commit, if the branch has not moved and all LFS objects have arrived."""
        repo = self.repo(repo_id, write=True)
        files: dict[str, bytes | str] = dict(self.commit(repo_id, branch).files)
        message = ""
        for line in body.splitlines():
            key, value = json.loads(line).values()
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, repo.branches[branch]):
                    raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise RefusedError(400, f"{value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            else:
                assert key == "deletedFile", key
                del files[value["path"]]
        commit = repo.add(branch, message, files)
        self.send_json({"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit.sha}", "commitOid": commit.sha})

    def info(self, body: bytes, repo_id: str, revision: str | None = None) -> None:
        repo, commit = self.repo(repo_id), self.commit(repo_id, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.send_json({"id": repo_id, "sha": commit.sha, "private": repo.private, "siblings": siblings})

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str | None = None) -> None:
        """List the files of a version, or of a folder of it."""
        commit = self.commit(repo_id, revision)
        paths = [path for path in sorted(commit.files) if path.startswith(f"{folder}/" if folder else "")]
        if not paths:
            raise RefusedError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self.send_json([{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in paths])

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        """Answer with a file, or with where its LFS object is."""
        commit = self.commit(repo_id, revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self.send(404, b"Entry not found", headers)
            return
        file = commit.files[path]
        if isinstance(file, str):
            size = str(len(self.hub.objects[file]))
            headers |= {"X-Linked-Etag": f'"{file}"', "X-Linked-Size": size, "ETag": f'"{file[:40]}"'}
            self.send(302, b"", headers | {"Location": f"{self.hub.storage}/lfs/{file}"})
            return
        self.send(200, file, headers | {"ETag": f'"{hashlib.sha1(file).hexdigest()}"'})

    def download(self, body: bytes, sha: str) -> None:
        self.send(200, self.hub.objects[sha], {"ETag": f'"{sha}"'})


ID, REST = r"([\w.-]+/[\w.-]+)", r"(.+)"
ROUTES: tuple[tuple[tuple[str, ...], str, Callable[..., None]], ...] = (
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("POST",), f"/api/models/{ID}/branch/{REST}", _Handler.branch),
    (("POST",), f"/api/models/{ID}/preupload/{REST}", _Handler.preupload),
    (("POST",), f"/api/models/{ID}/commit/{REST}", _Handler.make_commit),
    (("POST",), f"/{ID}\\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/lfs/(\w+)", _Handler.upload),
    (("GET",), f"/api/models/{ID}", _Handler.info),
    (("GET",), f"/api/models/{ID}/revision/{REST}", _Handler.info),
    (("GET",), f"/api/models/{ID}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    (("GET", "HEAD"), f"/{ID}/resolve/([^/]+)/{REST}", _Handler.resolve),
    (("GET", "HEAD"), r"/lfs/(\w+)", _Handler.download),
)


@contextlib.contextmanager
def hub_server(**users: str) -> Iterator[HubServer]:
    """Run a Hub whose users have these tokens: `hub_server(me="hf_secret")`."""
    server = HubServer({token: user for user, token in users.items()})
    try:
        yield server
    finally:
        server.hold.clear()
        server.http.shutdown()
        server.http.server_close()
