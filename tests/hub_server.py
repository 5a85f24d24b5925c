"""A Hub on this machine: what `huggingface_hub`'s client asks of it to push and load models, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import yaml
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub


USER = "tester"

LARGE = (".safetensors", ".bin", ".pt", ".pth")


class Hub:
    """
    Repositories of models, with one branch each.

    Attributes:
        files: Per repository, its files by path.
        commits: (repository, message, paths that were added, paths or folders that were deleted), in order.
        requests, tokens: What has been asked, and by whom.
        failing: A pattern of paths of requests that are answered with an error, and its status.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str, list[str], list[str]]] = []
        self.requests: list[str] = []
        self.tokens: list[str] = []
        self.failing: tuple[str, int] | None = None
        self.gate = threading.Event()  # commits wait for it
        self.gate.set()
        self._objects: dict[str, bytes] = {}

        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def handle_any(self):
                path = unquote(urlsplit(self.path).path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append(f"{self.command} {path}")
                if "Authorization" in self.headers:  # an upload's address is leave enough
                    hub.tokens.append(self.headers["Authorization"].removeprefix("Bearer "))
                if hub.failing is not None and re.search(hub.failing[0], path):
                    status, headers, content = hub.failing[1], {}, b'{"error": "out of order"}'
                else:
                    status, headers, content = hub.answer(self.command, path, body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sha(self, repo: str) -> str:
        return hashlib.sha1(str([c for c in self.commits if c[0] == repo]).encode()).hexdigest()

    # ---- Requests

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        for pattern, answer in (
            (r"/api/repos/create", self._create),
            (
                r"/api/whoami-v2",
                lambda body: {"type": "user", "name": USER, "auth": {"accessToken": {"role": "write"}}},
            ),
            (r"/api/validate-yaml", self._validate),
            (r"/api/models/(.+)/preupload/[^/]+", self._preupload),
            (r"/(.+)\.git/info/lfs/objects/batch", self._lfs_batch),
            (r"/lfs/(.+)", self._lfs_upload),
            (r"/api/models/(.+)/commit/[^/]+", self._commit),
            (r"/api/models/(.+?)/tree/[^/]+/?(.*)", self._tree),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", self._info),
            (r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self._resolve),
        ):
            if match := re.fullmatch(pattern, path):
                result = answer(*match.groups(), body)
                if isinstance(result, tuple):
                    return result
                return 200, {"Content-Type": "application/json"}, json.dumps(result).encode()
        return 404, {}, b"{}"

    def _create(self, body):
        asked = json.loads(body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        known = repo in self.files
        self.files.setdefault(repo, {})
        answer = {"url": f"{self.url}/{repo}", "id": repo, "name": repo}
        return (409, {"Content-Type": "application/json"}, json.dumps(answer).encode()) if known else answer

    def _validate(self, body):
        content = json.loads(body)["content"]
        assert isinstance(yaml.safe_load(content.split("---")[1]), dict)
        return {"errors": [], "warnings": []}

    def _preupload(self, repo, body):
        known = self.files[repo]
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(file["path"], known[file["path"]]) if file["path"] in known else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _lfs_batch(self, repo, body):
        objects = json.loads(body)["objects"]
        for entry in objects:
            if entry["oid"] not in self._objects:
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _lfs_upload(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            return 422, {}, b'{"error": "the content is not what was announced"}'
        self._objects[oid] = body
        return {}

    def _commit(self, repo, body):
        self.gate.wait(30)
        files, added, deleted, message = dict(self.files[repo]), [], [], ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                continue
            path = value["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[path] = self._objects[value["oid"]]
            else:
                files = {name: c for name, c in files.items() if not f"{name}/".startswith(f"{path.rstrip('/')}/")}
            (deleted if line["key"].startswith("deleted") else added).append(path)
        self.files[repo] = files
        self.commits.append((repo, message, added, deleted))
        return {"commitUrl": f"{self.url}/{repo}/commit/{self.sha(repo)}", "commitOid": self.sha(repo)}

    def _tree(self, repo, folder, body):
        if repo not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        return [
            {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
            for path, content in self.files[repo].items()
            if path.startswith(folder)
        ]

    def _info(self, repo, body):
        if repo not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        return {"id": repo, "sha": self.sha(repo), "siblings": [{"rfilename": path} for path in self.files[repo]]}

    def _resolve(self, repo, path, body):
        if repo not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if path not in self.files[repo]:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.sha(repo)}, b""
        content = self.files[repo][path]
        return 200, {"ETag": f'"{_git_oid(content)}"', "X-Repo-Commit": self.sha(repo)}, content


def _oid(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else _git_oid(content)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running(monkeypatch, cache: Path):
    """A Hub that this process's client talks to, instead of to the real one."""
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
    huggingface_hub.utils.close_session()
    try:
        yield hub
    finally:
        hub.gate.set()
        hub.close()
        huggingface_hub.utils.close_session()
