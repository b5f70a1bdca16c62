"""A real HTTP server on this machine that answers as told: well, slowly, wrongly or not at all."""

from __future__ import annotations

import base64
import gzip
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TEXT = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Answer:
    """One answer, how it is spoilt, and what follows it when it is asked for again (itself, when None)."""

    body: bytes = b""
    status: int = 200
    content_type: str = TEXT
    headers: dict[str, str] = field(default_factory=dict)
    gzipped: bool = False
    cut: bool = False
    wait_s: float = 0.0
    drip_s: float = 0.0
    then: Answer | None = None


@contextmanager
def serving(answers: dict[str, Answer], certificate: tuple[str, str] | None = None, key: str | None = None
            ) -> Iterator[str]:  # fmt: skip
    """A server for as long as the block lasts; yields its address.

    Paths that ``answers`` lacks are 404, and without ``key`` (when there is one) everything is 401.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.get(self.path, Answer(b"Not Found", 404))
            basic = base64.b64encode((key or "").encode()).decode()
            if key is not None and self.headers.get("Authorization") not in (f"Bearer {key}", f"Basic {basic}"):
                answer = Answer(b"", 401)
            if answer.then is not None:
                answers[self.path] = answer.then
            time.sleep(answer.wait_s)
            body = gzip.compress(answer.body) if answer.gzipped else answer.body
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            self.send_header("Content-Length", str(len(body) + 1000 * answer.cut))
            if answer.gzipped:
                self.send_header("Content-Encoding", "gzip")
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for byte in body if answer.drip_s else ():
                    self.wfile.write(bytes([byte]))
                    time.sleep(answer.drip_s)
                if not answer.drip_s:
                    self.wfile.write(body)
            except OSError:
                pass  # the client gave up, as it should

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
