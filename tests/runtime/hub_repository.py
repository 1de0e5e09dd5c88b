"""Repositories of the Hugging Face hub without it: its cache's layout, and a server like it."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(
    cache: Path, name: str, files: Mapping[str, bytes], refs: tuple[str, ...] = ("main",)
) -> Path:
    """Store ``files`` as the hub's library does, and return the snapshot's folder."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for path, content in files.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        link = snapshot / path
        for each in (blob, link):
            each.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        up = Path(*[".."] * (len(link.relative_to(repository).parts) - 1))
        link.symlink_to(up / "blobs" / blob.name)
    for ref in refs:
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(COMMIT)
    return snapshot


@contextmanager
def served_repository(name: str, files: Mapping[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serve one repository; give the address and the list of the files that are asked for."""
    downloaded: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            resolve = f"/{name}/resolve/{COMMIT}/"
            if path == f"/api/models/{name}/revision/main":
                self._reply(json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode())
            elif path == f"/api/models/{name}/tree/{COMMIT}":
                entries = [
                    {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
                    for path, content in files.items()
                ]
                self._reply(json.dumps(entries).encode())
            elif path.startswith(resolve) and path.removeprefix(resolve) in files:
                file = path.removeprefix(resolve)
                if self.command == "GET":
                    downloaded.append(file)
                self._reply(files[file], ETag=f'"{oid(files[file])}"')
            else:
                self._reply(b"{}", status=404, **{"X-Error-Code": "RepoNotFound"})

        def _reply(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for key, value in ({"X-Repo-Commit": COMMIT} | headers).items():
                self.send_header(key, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", downloaded
        finally:
            server.shutdown()
            thread.join()


def oid(content: bytes) -> str:
    """The name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
