"""The endpoints of the Hugging Face Hub that an upload calls, on a loopback address."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_token_of_me"
USER = "me"


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        repos: for each repository its files by name.
        private: whether each is private.
        commits: number of commits to each.
        objects: large files by sha256.
        sent: sha256 of the large files that clients have sent, in order.
        refused: number of large files to refuse from now on.
        requests: method and path of every request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: dict[str, int] = {}
        self.objects: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.refused = 0
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._begin()
        repo = self.path.split("/tree/")[0].removeprefix("/api/models/")
        files = self.server.repos.get(repo)
        if files is None:
            self._answer({"error": "Repository not found"}, 404)
            return
        self._answer([{"type": "file", "path": f, "oid": "0", "size": 1} for f in files])

    def do_PUT(self) -> None:
        body = self._begin()
        if self.server.refused:
            self.server.refused -= 1
            self._answer({"error": "the storage is full"}, 403)
            return
        oid = hashlib.sha256(body).hexdigest()
        assert self.path == f"/storage/{oid}"
        self.server.sent.append(oid)
        self.server.objects[oid] = body
        self._answer({})

    def do_POST(self) -> None:
        body = self._begin()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid credentials in Authorization header"}, 401)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self._answer({"files": [self._mode(each) for each in json.loads(body)["files"]]})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self._answer({"objects": [self._place(each) for each in json.loads(body)["objects"]]})
        else:
            repo = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            self._commit(repo, [json.loads(line) for line in body.splitlines()])

    def _begin(self) -> bytes:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _create(self, values: dict[str, Any]) -> None:
        owner = values["organization"] or USER
        repo = f"{owner}/{values['name']}"
        if owner != USER:
            self._answer({"error": f"You don't have the rights to create {repo}"}, 403)
            return
        status = 409 if repo in self.server.repos else 200
        self.server.repos.setdefault(repo, {".gitattributes": b""})
        self.server.private.setdefault(repo, values.get("visibility") == "private")
        self._answer({"url": f"{self.server.url}/{repo}"}, status)

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        is_large = file["path"].endswith(".safetensors")
        mode = "lfs" if is_large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _place(self, file: dict[str, Any]) -> dict[str, Any]:
        if file["oid"] in self.server.objects:
            return file
        return file | {"actions": {"upload": {"href": f"{self.server.url}/storage/{file['oid']}"}}}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.server.repos[repo])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.server.repos[repo] = files
        self.server.commits[repo] = self.server.commits.get(repo, 0) + 1
        self._answer({"commitUrl": f"{self.server.url}/{repo}/commit/1", "commitOid": "1"})
