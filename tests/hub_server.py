"""A small hub on loopback, spoken to by the real `huggingface_hub` client.

It serves folders as model repositories through the download protocol: model info, tree listing, HEAD and GET
of files with their commit, ETag and ranges. It takes pushes: a repository and a branch are created, large
files come through the LFS protocol (not through Xet), and a commit names them. Every commit stays available,
as on the hub, and switches make it fail in the ways that the hub and the network fail.

    commit(id, folder) ──► Repository ◄── GET /api/models/ID, …/ID/revision/REV, …/ID/tree/REV
                                 ▲    ◄── HEAD and GET /ID/resolve/REV/FILE
    POST repos/create, branch, preupload ── POST ID.git/info/lfs, PUT lfs/SHA256 ── POST commit/REV

The fixture `hub` points the client at it, with a cache of its own. A test module gets it by
`pytest_plugins = ["hub_server"]`.
"""

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants


@dataclass
class Repository:
    """Commits, each a folder, and the branches and tags that name them."""

    commits: dict[str, Path] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def resolve(self, revision: str) -> str | None:
        names = self.branches | self.tags
        return names.get(revision, revision if revision in self.commits else None)


class HubServer(ThreadingHTTPServer):
    """The hub: its repositories and its switches.

    Attributes:
        repositories: By id.
        token: The token that lets one into gated and private repositories.
        owners: Namespaces that the token may write to.
        large: Endings of files that must come through LFS.
        refusing: Path -> HTTP status to answer a request to it with.
        failing: Answers every request with HTTP 500.
        cut_after: Closes the connection after so many bytes of a body ...
        cuts_left: ... so many times; None means each time.
        requests: What was asked, as `METHOD path`, oldest first.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.repositories: dict[str, Repository] = {}
        self.token = "hf_a_token_that_is_right"
        self.owners = {"me"}
        self.large = (".safetensors", ".png")
        self.objects: dict[str, bytes] = {}
        self.refusing: dict[str, int] = {}
        self.failing = False
        self.cut_after: int | None = None
        self.cuts_left: int | None = None
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repository: str, folder: Path, tag: str | None = None, branch: str = "main") -> str:
        """Adds a copy of a folder as the newest commit of a branch, and returns the commit."""
        repo = self.repositories.setdefault(repository, Repository())
        commit = hashlib.sha1(f"{repository} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit] = Path(shutil.copytree(folder, self.root / commit))
        repo.branches[branch] = commit
        if tag is not None:
            repo.tags[tag] = commit
        return commit

    def fetched(self) -> set[str]:
        """Names the files whose content was asked for."""
        gets = (request for request in self.requests if request.startswith("GET") and "/resolve/" in request)
        return {request.rpartition("/")[2] for request in gets}

    def take_cut(self) -> int | None:
        """Says after how many bytes the next body breaks off, and counts it."""
        if self.cut_after is None or self.cuts_left == 0:
            return None
        if self.cuts_left is not None:
            self.cuts_left -= 1
        return self.cut_after


@contextmanager
def serve(root: Path) -> Iterator[HubServer]:
    """Runs a hub in a thread until the block ends."""
    with HubServer(root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format, *args):
        pass  # the log is server.requests

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer_write()

    def do_PUT(self):
        self._answer_write()

    def _answer(self):
        path = self._path()
        if path is None:
            return None
        match path.strip("/").split("/"):
            case ["api", "models", owner, name]:
                return self._answer_about(f"{owner}/{name}", "main", "revision")
            case ["api", "models", owner, name, "revision" | "tree" as what, revision]:
                return self._answer_about(f"{owner}/{name}", revision, what)
            case [owner, name, "resolve", revision, *file]:
                return self._answer_file(f"{owner}/{name}", revision, "/".join(file))
        return self._send(404, b"")

    def _path(self) -> str | None:
        """Notes a request; None where a switch has answered it."""
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        status = 500 if self.server.failing else self.server.refusing.get(path)
        if status is None:
            return path
        self._send(status, b"")
        return None

    def _answer_write(self):  # noqa: C901  # a case for each thing a client asks for
        body = self._body()
        path = self._path()
        if path is None:
            return None
        parts = path.strip("/").split("/")
        if parts[0] == "lfs":  # its address is the permission
            self.server.objects[parts[1]] = body
            return self._send(200 if hashlib.sha256(body).hexdigest() == parts[1] else 400, b"")
        authorization = self.headers.get("Authorization")
        if authorization != f"Bearer {self.server.token}":
            return self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        match parts:
            case ["api", "validate-yaml"]:
                return self._send_json({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case ["api", "models", owner, name, *_] | [owner, name, *_] if owner not in self.server.owners:
                return self._send(403, b"", {"X-Error-Message": "you must have write access"})
            case ["api", "models", owner, name, "branch", branch]:
                branches = self.server.repositories[f"{owner}/{name}"].branches
                known = branch in branches
                branches.setdefault(branch, branches["main"])
                return self._send_json({}, 409 if known else 200)
            case ["api", "models", _, _, "preupload", _]:
                modes = [
                    {"path": file["path"], "uploadMode": self._mode(file["path"]), "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self._send_json({"files": modes})
            case [_, _, "info", "lfs", "objects", "batch"]:
                return self._send_json(
                    {"objects": [self._accept(item) for item in json.loads(body)["objects"]]}
                )
            case ["api", "models", owner, name, "commit", branch]:
                return self._commit(f"{owner}/{name}", branch, body)
        return self._send(404, b"")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _create(self, wanted: dict):
        repository = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] not in self.server.owners:
            return self._send(403, b"", {"X-Error-Message": "no rights under this namespace"})
        known = repository in self.server.repositories
        if not known:
            first = self.server.root / f"first of {wanted['name']}"
            first.mkdir()
            (first / ".gitattributes").write_text("*.safetensors filter=lfs")
            self.server.commit(repository, first)
            self.server.repositories[repository].private = wanted.get("visibility") == "private"
        return self._send_json({"url": f"{self.server.url}/{repository}"}, 409 if known else 200)

    def _mode(self, path: str) -> str:
        return "lfs" if path.endswith(self.server.large) else "regular"

    def _accept(self, item: dict) -> dict:
        if item["oid"] in self.server.objects:
            return item
        return item | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}

    def _commit(self, repository: str, branch: str, body: bytes):
        repo = self.server.repositories[repository]
        with TemporaryDirectory() as scratch:
            folder = Path(shutil.copytree(repo.commits[repo.branches[branch]], Path(scratch) / "tree"))
            for line in body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                path = folder / value.get("path", ".")
                if operation["key"] == "deletedFile":
                    path.unlink()
                elif operation["key"] in ("file", "lfsFile"):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    small = operation["key"] == "file"
                    path.write_bytes(
                        base64.b64decode(value["content"]) if small else self.server.objects[value["oid"]]
                    )
            commit = self.server.commit(repository, folder, branch=branch)
        address = f"{self.server.url}/{repository}/commit/{commit}"
        return self._send_json({"commitUrl": address, "commitOid": commit})

    def _send_json(self, content: dict, status: int = 200):
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _find(self, repository: str, revision: str) -> tuple[Repository, str] | None:
        """Finds a repository and commit; answers as the hub does where there is none to be seen."""
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {self.server.token}"):
            self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
            return None
        repo = self.server.repositories.get(repository)
        if repo is None or (repo.private and authorization is None):
            self._send(404 if authorization else 401, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repo.resolve(revision)
        if commit is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return repo, commit

    def _answer_about(self, repository: str, revision: str, what: str):
        found = self._find(repository, revision)
        if found is None:
            return
        repo, commit = found
        root = repo.commits[commit]
        files = {
            path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()
        }
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            answer = {
                "id": repository,
                "modelId": repository,
                "sha": commit,
                "siblings": siblings,
                "private": repo.private,
                "tags": [],
            }
        else:
            answer = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                for name, path in files.items()
            ]
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, repository: str, revision: str, name: str):
        found = self._find(repository, revision)
        if found is None:
            return None
        repo, commit = found
        headers = {"X-Repo-Commit": commit}
        authorized = self.headers.get("Authorization") is not None
        if repo.gated and not authorized:
            return self._send(401, b"", headers | {"X-Error-Code": "GatedRepo"})
        path = repo.commits[commit] / name
        if not path.is_file():
            return self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        headers |= {"ETag": f'"{_etag(path)}"', "Accept-Ranges": "bytes"}
        content = path.read_bytes()
        start = self._range_start()
        if start is None:
            return self._send(200, content, headers)
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(206, content[start:], headers)

    def _range_start(self) -> int | None:
        asked = self.headers.get("Range")
        return int(asked.removeprefix("bytes=").partition("-")[0]) if asked else None

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.take_cut() if "/resolve/" in self.path else None
        if cut is None or cut >= len(body):
            self.wfile.write(body)
        else:
            self.wfile.write(body[:cut])
            self.close_connection = True


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running hub that the client of this process talks to, logged out, with an empty cache."""
    root = tmp_path / "hub"
    root.mkdir()
    with serve(root) as server:
        # The client reads its environment once, when it is imported, and its constants at every call.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        # Between tries the client sleeps for seconds.
        impatient = SimpleNamespace(sleep=lambda seconds: None)
        monkeypatch.setattr("huggingface_hub.file_download.time", impatient)
        monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
        huggingface_hub.close_session()  # one made under another environment
        yield server
        huggingface_hub.close_session()
