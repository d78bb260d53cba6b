"""A hub on this machine whose answers can fail, stall or be cut short: what huggingface_hub and datasets ask."""

import base64
import hashlib
import json
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"


class FakeHub:
    """Serves folders as repositories: `{"someone/tiny": folder}`, data sets under their own ids. A branch beside the
    main one has a key of its own: `{("someone/rows", "refs/convert/parquet"): folder}`.

    `faults` maps a file's name to what happens to the next requests for its bytes, one each: an HTTP status, "cut"
    (half of it, then the connection ends), "stall" (nothing for longer than the client waits).

    What is uploaded to a new repository lies in a folder of its own; `private` has those that are.
    """

    def __init__(self, models=None, datasets=None):
        self.repos: dict[tuple[str, str], Path] = {}
        self.branches: dict[tuple[str, str, str], Path] = {}  # by their names, and by their commits
        for kind, folders in (("models", models or {}), ("datasets", datasets or {})):
            for key, folder in folders.items():
                if isinstance(key, str):
                    self.repos[kind, key] = Path(folder)
                else:
                    self.branches |= {(kind, key[0], ref): Path(folder) for ref in (key[1], commit_of(key[1]))}
        self.faults: dict[str, list] = {}
        self.private: set[str] = set()
        self.tokens: set[str] = set()  # that were sent
        self.asked: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, document, status=200):
                self.send(json.dumps(document).encode(), {"Content-Type": "application/json"}, status)

            def send(self, body, headers, status=200, until=None):
                self.send_response(status)
                for key, value in {"Content-Length": len(body), **headers}.items():
                    self.send_header(key, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[:until])
                    if until is not None:
                        self.close_connection = True

            def do_POST(self):
                length = self.headers.get("Content-Length")
                body = self.rfile.read(int(length)) if length else self.chunks()
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                if parts[1:2] == ["repos"]:
                    self.make(json.loads(body))
                elif parts[1:2] == ["validate-yaml"]:
                    self.answer({"errors": [], "warnings": []})
                elif parts[4:5] == ["preupload"]:
                    files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                             for f in json.loads(body)["files"]]  # fmt: skip
                    self.answer({"files": files})
                elif parts[4:5] == ["commit"]:
                    self.commit("/".join(parts[2:4]), body)
                else:
                    self.take(body)

            def chunks(self):
                """The body of a request that does not say how long it is."""
                body = b""
                while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                return body

            def make(self, asked):
                name = f"{asked['organization']}/{asked['name']}"
                hub.asked.append(f"create {name} {asked.get('visibility')}")
                hub.tokens.add(self.headers.get("Authorization", ""))
                if ("models", name) in hub.repos:
                    self.answer({"url": f"{hub.url}/{name}"}, 409)
                    return
                hub.repos["models", name] = Path(tempfile.mkdtemp())
                if asked.get("visibility") == "private" or asked.get("private"):
                    hub.private.add(name)
                self.answer({"url": f"{hub.url}/{name}"})

            def commit(self, name, body):
                fault = hub.faults["commit"].pop(0) if hub.faults.get("commit") else None
                if fault:
                    self.send(b"", {}, fault)
                    return
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        file = hub.repos["models", name] / line["value"]["path"]
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_bytes(base64.b64decode(line["value"]["content"]))
                url = f"{hub.url}/{name}/commit/{COMMIT}"
                self.answer({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})

            def do_GET(self):
                self.take(b"")

            do_HEAD = do_GET

            def take(self, body):
                path = unquote(urlsplit(self.path).path).strip("/")
                hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
                parts = path.split("/")
                if parts[0] == "api" and len(parts) >= 4:
                    self.ask_about(parts[1], "/".join(parts[2:4]), parts[4:], body)
                    return
                kind = "datasets" if parts[0] == "datasets" else "models"
                parts = parts[1:] if kind == "datasets" else parts
                folder, commit, rest = self.at(kind, "/".join(parts[:2]), parts[3:])
                file = folder / "/".join(rest) if folder and rest and parts[2] == "resolve" else None
                if file is None or not file.is_file():
                    code = "EntryNotFound" if folder else "RepoNotFound"
                    self.send(b"", {"X-Error-Code": code}, 404)
                    return
                self.give(file, commit)

            def at(self, kind, name, rest):
                """A repository's folder at the revision that `rest` begins with, its commit, and what follows."""
                for (branch_kind, branch_name, ref), folder in hub.branches.items():
                    parts = ref.split("/")
                    if (branch_kind, branch_name, parts) == (kind, name, rest[: len(parts)]):
                        return folder, commit_of(ref), rest[len(parts) :]
                return hub.repos.get((kind, name)), COMMIT, rest[1:]

            def ask_about(self, kind, name, rest, body):
                folder, commit, inside = self.at(kind, name, rest[1:])
                if folder is None:
                    self.send(b"", {"X-Error-Code": "RepoNotFound"}, 404)
                    return
                files = sorted(p for p in folder.rglob("*") if p.is_file())
                entries = [
                    {
                        "type": "file",
                        "path": p.relative_to(folder).as_posix(),
                        "size": p.stat().st_size,
                        "oid": digest(p),
                    }
                    for p in files
                ]
                if rest[:1] == ["tree"]:
                    self.answer(listed(entries, "/".join(inside), "recursive=true" in self.path.lower()))
                elif rest[:1] == ["paths-info"]:
                    asked = parse_qs(body.decode()).get("paths", [])
                    self.answer([e for e in listed(entries, "", True) if e["path"] in asked])
                else:
                    siblings = [{"rfilename": e["path"], "size": e["size"]} for e in entries]
                    self.answer({"id": name, "sha": commit, "siblings": siblings, "private": name in hub.private,
                                 "tags": []})  # fmt: skip

            def give(self, file, commit):
                data = file.read_bytes()
                headers = {"ETag": f'"{digest(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
                fault = None
                if self.command == "GET" and hub.faults.get(file.name):
                    fault = hub.faults[file.name].pop(0)
                if isinstance(fault, int):
                    self.send(b"", {}, fault)
                    return
                if fault == "stall":
                    time.sleep(6)
                    self.close_connection = True
                    return
                status, wanted = 200, self.headers.get("Range")
                if wanted:
                    first = int(wanted.removeprefix("bytes=").split("-")[0])
                    last = wanted.split("-")[1]
                    end = min(len(data), int(last) + 1) if last else len(data)
                    headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(data)}"
                    data, status = data[first:end], 206
                self.send(data, headers, status, len(data) // 2 if fault == "cut" else None)

        return Handler


def listed(entries, folder, recursive):
    """The content of a folder of a repository: its files and folders, with `recursive` those of its folders too."""
    folders = {parent.as_posix() for e in entries for parent in Path(e["path"]).parents} - {"."}
    every = entries + [{"type": "directory", "path": f, "size": 0, "oid": "0" * 40} for f in sorted(folders)]
    inside = [e for e in every if not folder or e["path"].startswith(f"{folder}/")]
    depth = len(Path(folder).parts)
    return inside if recursive else [e for e in inside if len(Path(e["path"]).parts) == depth + 1]


def commit_of(branch):
    """The commit of a branch that is not the main one; of such a commit, itself."""
    return branch if len(branch) == 40 else hashlib.sha256(branch.encode()).hexdigest()[:40]


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()
