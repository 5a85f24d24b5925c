"""A chat endpoint on this machine that answers as a test tells it to, however badly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(content: Any, *, finish_reason: str = "stop") -> dict:
    message = {"role": "assistant", "content": content}
    return {"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}


class ChatServer:
    """
    Serves until the end of its `with` block.

    Args:
        answer: Called with the request's fields and its number, from 0; returns what to do: a string is a reply, a
            dict the whole body, bytes the raw body, an int a status, `(status, headers, body)` all of these, a float
            how many seconds to sleep before "slept", "drop" closes the connection, "half" breaks off within the body,
            "trickle" sends a byte now and then.

    Attributes:
        requests: The fields of all requests, in their order.
        headers: Their headers.
        peak: The most requests that were under way at a time.
    """

    def __init__(self, answer: Callable[[dict, int], Any]) -> None:
        self.answer = answer
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.paths: list[str] = []
        self.peak = self._running = 0
        self._lock = threading.Lock()

    def __enter__(self) -> ChatServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._serve(self)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

            def handle_error(self, *args: Any) -> None:  # a client that gave up
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        fields = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        with self._lock:
            number = len(self.requests)
            self.requests.append(fields)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self.paths.append(handler.path)
            self._running += 1
            self.peak = max(self.peak, self._running)
        try:
            reply = self.answer(fields, number)
            if isinstance(reply, float):
                time.sleep(reply)
                reply = "slept"
        finally:
            with self._lock:
                self._running -= 1
        self._send(handler, reply)

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, reply: Any) -> None:
        broken = reply if reply in ("drop", "half", "trickle") else None
        if broken == "drop":
            handler.close_connection = True
            return
        status, headers, body = reply if isinstance(reply, tuple) else (200, {}, reply)
        if isinstance(body, int):
            status, body = body, {"error": {"message": f"status {body}"}}
        if isinstance(body, str):
            body = completion(body)
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if broken == "half":
            handler.wfile.write(body[: len(body) // 2])
            handler.close_connection = True
        elif broken == "trickle":
            for byte in body:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(0.05)
        else:
            handler.wfile.write(body)
