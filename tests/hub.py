"""A server on this machine that answers as the hub does: as much of its HTTP interface as the libraries ask for.

huggingface_hub reads the address when it is imported, so that the product runs in a process of its own: ``Hub.run``.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]
TOKEN = "hf_of_this_test"
CREATED = "2024-05-01T12:00:00.000Z"
KINDS = {"models": "", "datasets": "datasets/"}  # with what stands before their names in addresses of files
CUT_OFF = -1  # in the place of a status: the connection ends in the middle of the file


@dataclass
class Repository:
    """A model or a data set: its commits, the branches that name them, and what goes wrong with it."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False  # for those who do not give the token
    faults: dict[str, int] = field(default_factory=dict)  # the status of all that asks for this file, "" for the API

    def commit(self, files: Files, branch: str = "main") -> str:
        """Put ``files`` on a branch; the commit's hash."""
        digest = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[digest], self.branches[branch] = files, digest
        return digest


class Hub(ThreadingHTTPServer):
    """The server with its repositories, by kind and name, and the paths of its requests."""

    daemon_threads = True

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        super().__init__(("127.0.0.1", 0), _Answer)
        Thread(target=partial(self.serve_forever, poll_interval=0.05), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def model(self, name: str) -> Repository:
        """The model's repository, which is made where there is none."""
        return self.repositories.setdefault(f"models/{name}", Repository())

    def dataset(self, name: str) -> Repository:
        """The data set's repository, which is made where there is none."""
        return self.repositories.setdefault(f"datasets/{name}", Repository())

    def run(self, code: str, cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Python code in a process that takes this server for the hub, and keeps its files in ``cache``."""
        ours = {"HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        others = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=others | ours | {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"} | variables,
            timeout=300,
            check=False,
        )


class _Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing is logged; tests read ``Hub.requests``."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        if not path:
            return self._send(200, b"the hub")
        api = path.startswith("api/")
        kind = next((kind for kind in KINDS if path.startswith(f"api/{kind}/" if api else f"{kind}/")), "models")
        inside = path.removeprefix("api/").removeprefix(f"{kind}/").split("/")
        name, rest = "/".join(inside[:2]), inside[2:]
        found = self.server.repositories.get(f"{kind}/{name}")
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None:  # the hub tells nobody who is not known whether a repository is private or missing
            return self._refuse(404 if known else 401, "RepoNotFound", "Repository not found")
        if found.gated and not known and rest[:1] in (["resolve"], ["auth-check"]):
            return self._refuse(401, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted.")
        if api and (status := found.faults.get("")):
            return self._refuse(status, "", "of the API")
        return self._api(name, found, rest) if api else self._file(found, rest)

    def _revision(self, found: Repository, parts: list[str]) -> tuple[str, list[str]] | None:
        """The commit that the first of ``parts`` name, of which a branch may have several, and those after it."""
        for count in range(1, len(parts) + 1):
            name = "/".join(parts[:count])
            if commit := found.branches.get(name) or next((c for c in found.commits if c == name), None):
                return commit, parts[count:]
        return None

    def _api(self, name: str, found: Repository, rest: list[str]) -> None:
        what, parts = (rest[0], rest[1:]) if rest else ("revision", ["main"])
        at = self._revision(found, parts)
        if what == "auth-check":
            return self._json({})
        if what not in ("revision", "tree", "paths-info"):
            return self._refuse(404, "", "Not found")
        if at is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {'/'.join(parts)}")
        files = found.commits[at[0]]
        if what == "revision":
            info = {"id": name, "sha": at[0], "createdAt": CREATED, "lastModified": CREATED, "private": False}
            info |= {"gated": "manual" if found.gated else False, "tags": [], "downloads": 0, "likes": 0}
            return self._json(info | {"siblings": [{"rfilename": file} for file in files]})
        entries = [_entry(path, content) for path, content in files.items()]
        folders = {parent for path in files for parent in Path(path).parents} - {Path()}
        entries += [{"type": "directory", "path": str(folder), "oid": _oid(b"")} for folder in sorted(folders)]
        if what == "paths-info":
            wanted = (
                json.loads(self._body)["paths"] if self._body[:1] == b"{" else parse_qs(self._body.decode())["paths"]
            )
            return self._json([entry for entry in entries if entry["path"] in wanted])
        under = "".join(f"{part}/" for part in at[1])
        within = [entry for entry in entries if entry["path"].startswith(under)]
        if under and not within:
            return self._refuse(404, "EntryNotFound", f"{under} does not exist")
        if parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() not in ("true", "1"):
            within = [entry for entry in within if "/" not in entry["path"].removeprefix(under)]
        return self._json(within)

    def _file(self, found: Repository, rest: list[str]) -> None:
        at = self._revision(found, rest[1:]) if rest[:1] == ["resolve"] else None
        if at is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        commit, path = at[0], "/".join(at[1])
        headers = {"X-Repo-Commit": commit}
        content = found.commits[commit].get(path)
        if content is None:
            return self._refuse(404, "EntryNotFound", f"{path} does not exist", headers)
        headers |= {"ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes", "X-Linked-Size": str(len(content))}
        fault = found.faults.get(path)
        if fault and fault != CUT_OFF:
            return self._refuse(fault, "", "of the file", headers)
        status, start = 200, 0
        if (wanted := self.headers.get("Range", "")).startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first or 0), int(last or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            status, content = 206, content[start:end]
        return self._send(status, content, headers, cut_off=fault == CUT_OFF)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, why: str, headers: dict[str, str] | None = None) -> None:
        error_headers = {"X-Error-Code": code, "X-Error-Message": why} if code else {}
        self._send(status, json.dumps({"error": why}).encode(), (headers or {}) | error_headers)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, *, cut_off: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut_off else content)
        self.close_connection = cut_off


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}


def files_of(folder: Path) -> Files:
    """The files of a folder as a commit has them."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
