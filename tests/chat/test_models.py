"""Models of the chat: one in memory, and one behind a server."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.hf_models import make_hf_model

from fm9g.chat.model import UNLIMITED, LocalChatModel, OpenAIChatModel
from fm9g.errors import UserError
from fm9g.infer.completion import Piece
from fm9g.infer.open_model import open_model
from fm9g.infer.options import GenerationOptions

QUESTION = [{"role": "user", "content": "你好"}]


class Server(ThreadingHTTPServer):
    """Speaks as much of the OpenAI API as the chat needs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models: list[dict[str, Any]] = [{"id": "base", "max_model_len": 64}, {"id": "law"}]
        self.key, self.status, self.requests, self.breaks = "", 200, [], False
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            return self._send(401, {"error": {"message": "no"}})
        return self._send(200, {"object": "list", "data": self.server.models})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        if self.server.status != 200:
            return self._send(self.server.status, {"error": {"message": "too long"}})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if self.server.breaks:
            self.send_header("Content-Length", "99999")
        self.end_headers()
        for delta, reason in (({"role": "assistant"}, None), ({"content": "您"}, None), ({"content": "好"}, "length")):
            chunk = {"id": "1", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        if not self.server.breaks:
            self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running
        running.shutdown()


def test_an_answer_of_a_server(server: Server) -> None:
    model = OpenAIChatModel(server.url, "key")
    assert (model.name, model.adapters, model.adapter, model.max_model_len) == ("base", ("law",), "", 64)
    pieces = list(model.stream(QUESTION, GenerationOptions(max_new_tokens=5, temperature=0.5, stop=("x",))))
    assert pieces == [Piece(), Piece("您"), Piece("好", finish_reason="length")]
    assert server.requests[0] == {
        "model": "base",
        "messages": QUESTION,
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 1.0,
        "seed": 1234,
        "stop": ["x"],
        "stream": True,
    }
    model.use_adapter("law")
    list(model.stream(QUESTION, GenerationOptions(top_k=3)))
    assert (server.requests[1]["model"], server.requests[1]["top_k"]) == ("law", 3)
    with pytest.raises(UserError, match="adapter low: unknown; the server has: law"):
        model.use_adapter("low")
    assert OpenAIChatModel(server.url, model="law").max_model_len == UNLIMITED


def test_errors_of_a_server_are_one_message(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="has no model other; it has: base, law"):
        OpenAIChatModel(server.url, model="other")
    model = OpenAIChatModel(server.url)
    server.status = 400
    with pytest.raises(UserError, match="too long"):
        list(model.stream(QUESTION, GenerationOptions()))
    server.status, server.breaks = 200, True
    with pytest.raises(UserError, match="closed connection"):
        list(model.stream(QUESTION, GenerationOptions()))
    server.key = "right"
    with pytest.raises(UserError, match="refuses the key; give one with --api_key"):
        OpenAIChatModel(server.url, "wrong")
    with pytest.raises(UserError, match="not a url: "):
        OpenAIChatModel("not a url")
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="the server cannot be reached"):
        OpenAIChatModel(server.url)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="needs the package openai"):
        OpenAIChatModel(server.url)


def test_an_answer_of_a_model_in_memory(tokenizer_path: Path, tmp_path: Path) -> None:
    make_hf_model("llama", {"bos_token_id": 0, "eos_token_id": 1}, tmp_path)
    shutil.copytree(tokenizer_path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    loaded = open_model(tmp_path)
    model, options = LocalChatModel(loaded), GenerationOptions(max_new_tokens=8)
    assert (model.name, model.adapters, model.adapter, model.max_model_len) == (tmp_path.name, (), "", 128)
    assert model.count_tokens(QUESTION) == len(loaded.prompts.encode_chat(QUESTION))
    assert "".join(piece.text for piece in model.stream(QUESTION, options)) == loaded.generate(QUESTION, options)
    pieces = model.stream(QUESTION, options)
    next(pieces)
    pieces.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "fm9g generation"]
    with pytest.raises(UserError, match="unknown"):
        model.use_adapter("law")
