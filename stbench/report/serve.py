"""Serve the report page while runs train: rendered again when a file of a run changes.

The page asks `/version` every few seconds. Only GET and HEAD of two paths are answered.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from stbench.core.errors import UserError
from stbench.core.text import visible
from stbench.report.page import error_page
from stbench.runs.folder import find_runs

LOOPBACK = ("127.0.0.1", "localhost")
TIMEOUT = 30
"""Seconds after which a connection that sends nothing is closed."""


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    return host in LOOPBACK


class ReportServer(ThreadingHTTPServer):
    """Serves the page of the runs at or below `paths`.

    Args:
        paths: Run folders or directories of them, and other files and folders; watched for changes.
        render: Reads the runs and returns the page; its argument is the version of the runs.
        host: Address to listen on.
        port: Port; 0 for a free one.

    Raises:
        UserError: If the address cannot be used.
    """

    daemon_threads = True

    def __init__(self, paths: Sequence[Path], render: Callable[[str], str], host: str, port: int) -> None:
        self._paths = paths
        self._render = render
        self._lock = threading.Lock()
        self._version = ""
        self._page = b""
        self.checks_host = is_loopback(host)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"cannot serve on {visible(host, 100)} port {port}: {reason}; choose another --port, or "
                "--port 0 for a free one"
            ) from None
        self.url = f"http://{host}:{self.server_port}/"

    def page(self) -> bytes:
        """Return the current page."""
        with self._lock:
            version = version_of(self._paths)
            if version != self._version:
                try:
                    page = self._render(version)
                except UserError as error:
                    return error_page(str(error)).encode()
                self._version, self._page = version, page.encode()
            return self._page


def version_of(paths: Sequence[Path]) -> str:
    """Return a hash of names, sizes and times of the files in run folders and beside them."""
    digest = hashlib.sha256()
    folders = {folder for path in paths for folder in _folders(path)}
    for folder in sorted(folders):
        try:
            found = sorted((entry.name, entry.stat()) for entry in os.scandir(folder) if entry.is_file())
        except OSError:
            continue  # deleted meanwhile
        for name, status in found:
            digest.update(os.fsencode(f"{folder}/{name}\0{status.st_mtime_ns} {status.st_size}\n"))
    return digest.hexdigest()[:16]


def _folders(path: Path) -> list[Path]:
    """Return the folders whose files are watched for a path: its own and those of the runs in it."""
    if path.is_file():
        return [path.parent]
    try:
        return [path, *find_runs(path)]
    except UserError:
        return [path]  # without runs


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    timeout = TIMEOUT

    def do_GET(self) -> None:
        """Answer `/` with the page and `/version` with its version."""
        # Under another name, a page of another origin could read this one (DNS rebinding).
        name = self.headers.get("Host", "").partition(":")[0]
        if self.server.checks_host and name not in LOOPBACK:
            self._answer(403, "text/plain", b"unknown host\n")
        elif self.path == "/":
            self._answer(200, "text/html", self.server.page())
        elif self.path == "/version":
            self._answer(200, "text/plain", version_of(self.server._paths).encode())
        else:
            self._answer(404, "text/plain", b"not found\n")

    do_HEAD = do_GET

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing for a request."""
