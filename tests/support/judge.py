"""A judge over real HTTP: a server that speaks the chat completions protocol and can be told to misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """Answers `POST /v1/chat/completions` with `reply`: a text, (status, headers, body), or `None` for silence."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Callable[[dict[str, Any], int], Any] = lambda body, number: "Fine. Rating: [[7]]"
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests.append(body)
                    outer.headers.append({name.title(): value for name, value in self.headers.items()})
                    number = len(outer.requests)
                if self.path != "/v1/chat/completions":
                    self.send_error(404)
                    return
                reply = outer.reply(body, number)
                if reply is None:
                    time.sleep(0.6)
                    self.close_connection = True
                    return
                if isinstance(reply, str):
                    content = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
                    reply = 200, {}, json.dumps(content)
                status, headers, text = reply
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Type" not in headers:
                    self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
