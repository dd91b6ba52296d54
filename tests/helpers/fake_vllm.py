#!/usr/bin/env python3
"""A program that behaves like vLLM as far as fm9g can see. FAKE_VLLM says how: die, hang, or nothing."""

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BEHAVIOUR = os.environ.get("FAKE_VLLM", "")
WORDS = sys.argv[1:]
PORT = int(WORDS[WORDS.index("--port") + 1])


class Handler(BaseHTTPRequestHandler):
    hanging = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/health":
            if self.hanging.is_set():
                time.sleep(60)
            self.answer(b"")
        elif self.path == "/metrics":
            self.answer(b"vllm:requests 7\n")
        elif self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.send_error(401)
        else:
            self.answer(json.dumps({"object": "list", "data": [{"id": "fake", "words": WORDS}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["prompt"] == "die":
            os._exit(3)
        if body["prompt"] == "hang":
            self.hanging.set()
        if body.get("stream"):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                for number in range(10_000):
                    self.wfile.write(f"data: {number}\n\n".encode())
                    time.sleep(0.01)
            except OSError:
                print("the client left", flush=True)
            return
        self.answer(json.dumps({"pid": os.getpid(), "got": body}).encode())

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


if BEHAVIOUR == "die":
    print("INFO starting\nValueError: the architecture Own is not supported", flush=True)
    sys.exit(1)
ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
