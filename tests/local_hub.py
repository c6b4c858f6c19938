"""A server that speaks as much of the Hub's API as publishing, reading back and reading data sets take; content lies in
memory.

There are self-hosted hubs (KohakuHub, for one), which need a database and an object store to run.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote


TOKEN = "hf_right"
LFS_SUFFIXES = (".safetensors", ".png")


class LocalHub:
    """Repositories by id, each a dict of branches, each a dict of files; start with `with`.

    Attributes:
        repos: `{repo_id: {"private": bool, "branches": {name: {"sha": str, "files": {path: bytes}}}}}`; the id of a
            data set is `datasets/owner/name`, see `add_data`.
        blobs: what was uploaded as a large file, by SHA-256.
        uploads: how often each of them was sent.
        messages: what the commits say, in their order.
        cut_uploads, cut_commits: so many of the next uploads and commits lose their connection.
        upload_seconds: how long an upload waits before its content is read.
    """

    def __init__(self):
        self.repos, self.blobs, self.uploads, self.messages = {}, {}, {}, []
        self.cut_uploads = self.cut_commits = self.upload_seconds = 0
        self.lock = threading.Lock()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def add_data(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> None:
        """A data set, or a new commit of one that is there."""
        main = {"sha": _commit_of(files), "files": dict(files)}
        self.repos[f"datasets/{repo_id}"] = {"private": private, "branches": {"main": main}}

    def takes_cut(self, name: str) -> bool:
        """Whether this request is one of those to cut; uploads come in several threads."""
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(0, left - 1))
            return left > 0

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo_id]["branches"][branch]["files"]


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if asked := re.fullmatch(r"/api/(datasets/[^/]+/[^/]+)/paths-info/([^/]+)", self.path):
            return self._paths_info(*asked.groups(), parse_qs(body.decode())["paths"])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        repo, _, what = re.match(r"/(?:api/models/)?([^/]+/[^/]+?)(\.git)?/(.*?)(?:\?.*)?$", self.path).groups()
        if repo not in self.hub.repos:
            return self._json({"error": "Repository not found"}, 404)
        kind, _, rest = what.partition("/")
        branches = self.hub.repos[repo]["branches"]
        if kind == "branch":
            branches[rest] = dict(branches["main"], files=dict(branches["main"]["files"]))
            return self._json({})
        if kind == "preupload":
            files = [
                {"path": f["path"], "uploadMode": self._mode(f["path"]), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if what == "info/lfs/objects/batch":
            return self._json({"transfer": "basic", "objects": [self._lfs(o) for o in json.loads(body)["objects"]]})
        assert kind == "commit", self.path
        if self.hub.takes_cut("cut_commits"):
            return self._cut()
        return self._commit(repo, branches[rest], [json.loads(line) for line in body.splitlines()])

    def _create(self, wanted: dict):
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        there = repo in self.hub.repos
        if not there:
            main = {"sha": "0" * 40, "files": {}}
            self.hub.repos[repo] = {"private": wanted.get("visibility") == "private", "branches": {"main": main}}
        return self._json({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}, 409 if there else 200)

    @staticmethod
    def _mode(path: str) -> str:
        return "lfs" if path.endswith(LFS_SUFFIXES) else "regular"

    def _lfs(self, wanted: dict) -> dict:
        if wanted["oid"] in self.hub.blobs:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}

    def do_PUT(self):
        oid = self.path.rsplit("/", 1)[1]
        if self.hub.takes_cut("cut_uploads"):
            self.rfile.read(min(16, int(self.headers["Content-Length"])))
            return self._cut()
        time.sleep(self.hub.upload_seconds)
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.blobs[oid] = content
        self.hub.uploads[oid] = self.hub.uploads.get(oid, 0) + 1
        return self._json({})

    def _commit(self, repo: str, branch: dict, lines: list[dict]):
        self.hub.messages += [line["value"]["summary"] for line in lines if line["key"] == "header"]
        with self.hub.lock:  # commits come in several threads, and each builds on the one before
            files = dict(branch["files"])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
            branch["files"], branch["sha"] = files, _commit_of(files)
        return self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{branch['sha']}", "commitOid": branch["sha"]})

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body: bool = True):
        path = unquote(self.path.partition("?")[0])
        info = re.fullmatch(
            r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)(?:/revision/([^/]+)|/tree/([^/]+)/?(.*))?", path
        )
        file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo, revision = (
            (info[1], info[2] or info[3] or "main") if info else (file[1], file[2]) if file else (None,) * 2
        )
        branch = self._branch(repo, revision)
        if branch is None:
            return None
        if info and info[3]:
            entries = _entries(branch["files"], info[4], "recursive=True" in self.path)
            return self._json(entries) if entries else self._json({}, 404, {"X-Error-Code": "EntryNotFound"})
        if info:
            known = {"id": repo.removeprefix("datasets/"), "private": self.hub.repos[repo]["private"]}
            return self._json({**known, "sha": branch["sha"], "siblings": [{"rfilename": n} for n in branch["files"]]})
        content = branch["files"].get(file[3])
        headers = {"X-Repo-Commit": branch["sha"]}
        if content is None:
            return self._json({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{_etag(content)}"'
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(content[first : last + 1], 206, headers, body)
        return self._send(content, 200, headers, body)

    def _branch(self, repo: str | None, revision: str) -> dict | None:
        """A branch, by its name or its commit, that the request may see; otherwise an answer was sent."""
        known = self.hub.repos.get(repo)
        if known is None or (known["private"] and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        branches = known["branches"]
        found = branches.get(revision) or next((b for b in branches.values() if b["sha"] == revision), None)
        if found is None:
            return self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return found

    def _paths_info(self, repo: str, revision: str, paths: list[str]):
        branch = self._branch(repo, revision)
        if branch is not None:
            files = {path: branch["files"][path] for path in paths if path in branch["files"]}
            self._json(_entries(files, "", recursive=True))

    def _cut(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self, content, status: int = 200, headers: dict | None = None):
        return self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int, headers: dict, body: bool = True):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)


def _commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def _entries(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """What lies in a folder, or anywhere below it."""
    inside = folder.rstrip("/") + "/" if folder else ""
    found = [
        {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
        for path, content in files.items()
        if path.startswith(inside) and (recursive or "/" not in path.removeprefix(inside))
    ]
    below = {parent.as_posix() for path in files for parent in PurePosixPath(path).parents if path.startswith(inside)}
    folders = [path for path in sorted(below - {".", folder}) if path.startswith(inside)]
    wanted = [path for path in folders if recursive or "/" not in path.removeprefix(inside)]
    return found + [{"type": "directory", "path": path, "oid": "0" * 40} for path in wanted]


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
