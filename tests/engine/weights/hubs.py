"""A Hugging Face hub on loopback: repositories in memory, the endpoints that clients call, and its ways to fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
_BLOCK = 1 << 14


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Add a commit with these files, and point `ref` to it."""
        commit = hashlib.sha1(repr((ref, sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None
    host: str


@dataclass
class Hub:
    """`url` is the endpoint; a test changes the rest as it likes. `token` is the only one that is let in anywhere."""

    url: str = ""
    cdn: str = ""  # the same server by another name of the machine, where large files are sent from
    token: str = "hf_good"
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)  # of the next answers
    break_after: list[int] = field(default_factory=list)  # bytes of the next file answers, then the connection ends
    replaced: dict[str, bytes] = field(default_factory=dict)  # path -> what is sent in place of the file
    ignores_ranges: bool = False
    hold_at: int | None = None  # bytes after which a file's answer waits for `release`
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def repository(self, repo: str) -> Repository:
        return self.repositories.setdefault(repo, Repository())

    def fetched(self) -> list[str]:
        """The paths of files that were asked for, in order."""
        return [request.path.split("/", 5)[5] for request in self.requests if "/resolve/" in request.path]


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    port = server.server_address[1]
    hub.url, hub.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # a client that was killed
            self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        authorization = self.headers.get("authorization")
        hub.requests.append(
            Request(self.command, path, self.headers.get("range"), authorization, self.headers.get("host", ""))
        )
        if hub.statuses:
            return self._send(hub.statuses.pop(0), b"not now")
        if path.startswith("/cdn/"):
            digest = path.removeprefix("/cdn/")
            return self._send_file(self._blob(digest), {"etag": f'"{digest}"'}, digest)
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/").strip("/").split("/", 4 if not api else 3)
        if len(parts) < 4 or parts[2] != ("revision" if api else "resolve"):
            return self._send(404, b"no such endpoint")
        if api:
            parts = [*parts[:3], "/".join(parts[3:])]
        self._repository(api, "/".join(parts[:2]), *parts[3:])

    def _repository(self, api: bool, repo: str, revision: str, file: str = "") -> None:
        hub, known = self.hub, self.headers.get("authorization") == f"Bearer {self.hub.token}"
        repository = hub.repositories.get(repo)
        if "authorization" in self.headers and not known:
            return self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if repository is None or (repository.private and not known):
            return self._send(404 if known else 401, b"", {"X-Error-Code": "RepoNotFound"})
        commit = repository.refs.get(revision, revision)
        files = repository.commits.get(commit)
        if files is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if api:
            info = {"id": repo, "sha": commit, "siblings": [_sibling(*item) for item in files.items()]}
            return self._send(200, json.dumps(info).encode(), {"content-type": "application/json"})
        if repository.gated and not known:
            return self._send(401, b"", {"X-Error-Code": "GatedRepo"})
        if file not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[file]
        headers = {"X-Repo-Commit": commit, "etag": f'"{git_sha1(data)}"'}
        if file.endswith(_LFS_SUFFIXES):
            digest = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            return self._send(302, b"", headers | {"location": f"{hub.cdn}/cdn/{digest}"})
        self._send_file(data, headers, file)

    def _blob(self, digest: str) -> bytes:
        everything = (
            (path, data)
            for repository in self.hub.repositories.values()
            for files in repository.commits.values()
            for path, data in files.items()
        )
        for path, data in everything:
            if hashlib.sha256(data).hexdigest() == digest:
                return self.hub.replaced.get(path, data)
        raise KeyError(digest)

    def _send_file(self, data: bytes, headers: dict[str, str], name: str) -> None:
        hub = self.hub
        data = hub.replaced.get(name, data)
        status, start = 200, 0
        wanted = self.headers.get("range")
        if wanted is not None and not hub.ignores_ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                return self._send(416, b"", {"content-range": f"bytes */{len(data)}"})
            status, headers = 206, headers | {"content-range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        limit = hub.break_after.pop(0) if hub.break_after and self.command == "GET" else None
        self._send(status, data[start:], headers, limit)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}, limit: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(body), _BLOCK):
            if self.hub.hold_at is not None and start >= self.hub.hold_at:
                self.hub.held.set()
                self.hub.release.wait(60)
            end = start + _BLOCK if limit is None else min(start + _BLOCK, limit)
            self.wfile.write(body[start:end])
            if limit is not None and start + _BLOCK >= limit:
                self.wfile.flush()
                self.close_connection = True
                return


def _sibling(path: str, data: bytes) -> dict[str, object]:
    found: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
    if path.endswith(_LFS_SUFFIXES):
        found["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return found
