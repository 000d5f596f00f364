"""A local stand-in of the hub: the part of its HTTP interface that huggingface_hub uses to create, fill and download
model repositories, in memory. Files are uploaded inside the commit; there is no LFS.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """Repositories by id: the files of each revision (main, and every commit), and which of them are private."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Sets the files of a revision; returns the id of the commit."""
        content = b"".join(path.encode() + data for path, data in sorted(files.items()))
        commit = hashlib.sha1(content).hexdigest()
        self.repositories.setdefault(name, {}).update({revision: files, commit: files})
        return commit


class Handler(BaseHTTPRequestHandler):
    """One request; the answer to an unknown one is 404, as the hub's."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self.handle_request("HEAD")

    def do_GET(self) -> None:
        self.handle_request("GET")

    def do_POST(self) -> None:
        self.handle_request("POST")

    def handle_request(self, method: str) -> None:
        path = unquote(self.path.partition("?")[0])
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(f"{method} {path}")
        for pattern, function in ROUTES.items():
            if (match := re.fullmatch(pattern, f"{method} {path}")) is not None:
                name = match.groupdict().get("name")
                if method == "POST" and not self.has_token():
                    self.answer(401, {"error": "Invalid user token."})
                elif name is not None and (name not in self.server.repositories or not self.may_read(name)):
                    self.answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                else:
                    function(self, **match.groupdict())
                return
        self.answer(404, {"error": f"no {method} {path}"})

    def may_read(self, name: str) -> bool:
        return name not in self.server.private or self.has_token()

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def commit_of(self, name: str, revision: str) -> str | None:
        revisions = self.server.repositories[name]
        files = revisions.get(revision)
        if files is None:
            self.answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return next(commit for commit, same in revisions.items() if same is files and len(commit) == 40)

    # -- the interface

    def create(self) -> None:
        request = json.loads(self.body)
        name = "/".join(filter(None, (request.get("organization"), request["name"])))
        if name not in self.server.repositories:
            self.server.add(name, {})
        if request.get("private") or request.get("visibility") == "private":
            self.server.private.add(name)
        self.answer(200, {"url": f"{self.server.address}/{name}", "name": name, "id": name})

    def branch(self, name: str, revision: str) -> None:
        revisions = self.server.repositories[name]
        revisions.setdefault(revision, revisions["main"])
        self.answer(200, {})

    def validate(self) -> None:
        front = json.loads(self.body)["content"].split("---\n")[1]
        metadata = yaml.safe_load(front)
        missing = [key for key in ("library_name", "tags") if key not in metadata]
        self.answer(400 if missing else 200, {"errors": [{"message": f"no {key}"} for key in missing], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        files = json.loads(self.body)["files"]
        modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
        self.answer(200, {"files": modes})

    def commit(self, name: str, revision: str) -> None:
        files = dict(self.server.repositories[name][revision])
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        target = "refs/pr/1" if "create_pr=1" in self.path else revision
        commit = self.server.add(name, files, target)
        answer = {"commitUrl": f"{self.server.address}/{name}/commit/{commit}", "commitOid": commit, "hookOutput": ""}
        pull_request = {"pullRequestUrl": f"{self.server.address}/{name}/discussions/1"} if target != revision else {}
        self.answer(200, answer | pull_request)

    def info(self, name: str, revision: str = "main") -> None:
        if (commit := self.commit_of(name, revision)) is not None:
            siblings = [{"rfilename": path} for path in self.server.repositories[name][revision]]
            content = {"_id": "0", "id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings}
            self.answer(200, content | {"tags": [], "downloads": 0, "likes": 0})

    def tree(self, name: str, revision: str) -> None:
        files = self.server.repositories[name][revision]
        entries = {path: {"size": len(data), "oid": hashlib.sha1(data).hexdigest()} for path, data in files.items()}
        self.answer(200, [{"type": "file", "path": path, **entry} for path, entry in entries.items()])

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self.commit_of(name, revision)
        if commit is None:
            return
        data = self.server.repositories[name][revision].get(path)
        if data is None:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        self.answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit})


NAME, REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>.+?)"
ROUTES = {
    "POST /api/repos/create": Handler.create,
    "POST /api/validate-yaml": Handler.validate,
    rf"POST /api/models/{NAME}/branch/{REVISION}": Handler.branch,
    rf"POST /api/models/{NAME}/preupload/{REVISION}": Handler.preupload,
    rf"POST /api/models/{NAME}/commit/{REVISION}": Handler.commit,
    rf"GET /api/models/{NAME}/revision/{REVISION}": Handler.info,
    rf"GET /api/models/{NAME}/tree/{REVISION}": Handler.tree,
    rf"GET /api/models/{NAME}": Handler.info,
    rf"(GET|HEAD) /{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": Handler.resolve,
}
