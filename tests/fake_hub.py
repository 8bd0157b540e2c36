"""A Hugging Face hub on the loopback interface: enough of its HTTP interface for downloads, listings, new repositories and commits."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


@dataclass
class FakeHub:
    """repositories: id -> path -> content; each has one commit, whose hash is made of its content. requests: method and path of each."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def add_folder(self, repo_id: str, folder: Path, under: str = "") -> None:
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        self.repositories.setdefault(repo_id, {}).update({f"{under}{name}": content for name, content in files.items()})

    def commit(self, repo_id: str) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.repositories[repo_id].items()):
            digest.update(name.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()


@contextmanager
def fake_hub(cache: Path) -> Iterator[FakeHub]:
    """huggingface_hub, and what is built on it, talk to this hub and keep what they fetch in `cache`."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", "hf_test")
        yield hub
    server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/(.+))?", path):
            self._with_revision(match[1], match[3], self._info)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(/.*)?", path):
            self._with_revision(match[1], match[2], self._tree)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._with_revision(match[1], match[2], lambda repo: self._file(repo, match[3]))
        else:
            self._json({"error": "unknown"}, 404)

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        body = self._body()
        if path == "/api/repos/create":
            given = json.loads(body)
            repo_id = "/".join(part for part in (given.get("organization", "tester"), given["name"]) if part)
            self.hub.repositories.setdefault(repo_id, {})
            self._json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": "1"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            self._json({"files": files})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.hub.repositories[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = self.hub.commit(match[1])
            self._json({"commitUrl": f"{self.hub.url}/{match[1]}/commit/{commit}", "commitOid": commit, "success": True})
        else:
            self._json({})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _with_revision(self, repo_id, revision, answer):
        if repo_id not in self.hub.repositories:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", self.hub.commit(repo_id)):
            return self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return answer(repo_id)

    def _info(self, repo_id):
        names = self.hub.repositories[repo_id]
        self._json({"_id": "1", "id": repo_id, "sha": self.hub.commit(repo_id), "siblings": [{"rfilename": n} for n in names]})

    def _tree(self, repo_id):
        entries = []
        for name, content in self.hub.repositories[repo_id].items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
            if name.endswith((".safetensors", ".bin", ".th", ".pth")):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def _file(self, repo_id, name):
        content, commit = self.hub.repositories[repo_id].get(name), {"X-Repo-Commit": self.hub.commit(repo_id)}
        if content is None:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", **commit})
        return self._send(content, 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "none", **commit})

    def _json(self, value, status=200, headers=None):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content, status, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
