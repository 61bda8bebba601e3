"""Real servers over a folder of shards: HTTP with ranges that misbehaves when it is told to, and S3."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MOTO = Path(os.environ.get("MOTO_VENV", ROOT / ".venv-moto"))
HOW = (
    f"needs moto's S3 server in an environment of its own (moto replaces packages that Hydra needs): "
    f"python -m venv {MOTO} && {MOTO}/bin/pip install 'moto[server]>=5'; MOTO_VENV names another place"
)


@dataclass
class Server:
    """A local HTTP server over a folder: what it was asked for, and how it misbehaves."""

    url: str
    ranges: bool = True
    failures: int = 0
    failure: int = 503
    retry_after: str | None = None
    cuts: int = 0
    ignores: int = 0
    shifted: int = 0
    changes: bool = False
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    sent: int = 0


class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, server: Server, *arguments: Any, **more: Any) -> None:
        self.state = server
        super().__init__(*arguments, **more)

    def do_GET(self) -> None:
        wanted = self.headers.get("Range") if self.state.ranges else None
        self.state.requests.append((self.path, wanted))
        if self.state.failures:
            self.state.failures -= 1
            self.send_response(self.state.failure)
            if self.state.retry_after is not None:
                self.send_header("Retry-After", self.state.retry_after)
            self.end_headers()
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        if self.state.changes:
            content = content[:-1] + bytes([len(self.state.requests) % 256])
        if wanted is not None and wanted != "bytes=0-0" and self.state.ignores:
            self.state.ignores -= 1
            wanted = None
        if wanted is None:
            self.send_response(200)
        else:
            first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            if first >= len(content):
                self.send_error(416)
                return
            if len(content) > 1 and first and self.state.shifted:
                self.state.shifted -= 1
                first, last = first - 1, last - 1
            place = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", place)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.state.cuts and len(content) > 1:
            self.state.cuts -= 1
            content = content[: len(content) // 2]
            self.close_connection = True
        self.state.sent += len(content)
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def http_server(folder: Path) -> Iterator[Server]:
    """A server over a folder, on a port of its own."""
    state = Server("")
    handler = functools.partial(Handler, state, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        state.url = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield state
        running.shutdown()


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of an empty S3 server, see `HOW`."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    log = subprocess.DEVNULL
    running = subprocess.Popen([MOTO / "bin" / "moto_server", "-p", str(port)], stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert running.poll() is None, "the S3 server ended by itself"
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(url, timeout=5).close()
                break
            time.sleep(0.1)
        yield url
    finally:
        running.terminate()
        running.wait()


def _free_port() -> int:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        return int(server.server_address[1])
