"""What a person types at the prompt: line editing, keys, the history."""

from __future__ import annotations

import os
import pty
import select
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.common import ROOT
from helpers.fake_chat import FakeChatModel
from prompt_toolkit.application import create_app_session
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from fm9g.chat.screen import Screen
from fm9g.chat.session import Chat
from fm9g.chat.terminal import prompt_session, talk
from fm9g.infer.options import GenerationOptions

SCRIPT = """
import os, threading
os.close(os.open(os.ttyname(0), os.O_RDWR))  # makes it the controlling terminal, which turns Ctrl-C into a signal
from helpers.fake_chat import FakeChatModel
from fm9g.chat.terminal import run_chat
from fm9g.infer.options import GenerationOptions
model = FakeChatModel()
model.answers["wait"] = ["beginning", threading.Event()]
status = run_chat([model], GenerationOptions())
print("seen", ascii([[message["content"] for message in messages] for messages in model.seen]), status)
"""

PROMPT = "\x1b[?2004h"  # bracketed paste, which the editor turns on when it is ready


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("你好\r", ["你好"]),
        ("你号\x7f好a\r", ["你好a"]),
        ("你好\x1b[D\x7f您\r", ["您好"]),  # left arrow
        ("one\x1b\rtwo\r", ["one\ntwo"]),  # Alt-Enter
        ("gone\x03kept\r", ["kept"]),
        ("//set\r/exit\rmore\r", ["/set"]),
    ],
)
def test_editing(typed: str, expected: list[str]) -> None:
    model = FakeChatModel()
    chat = Chat([model], GenerationOptions(), Screen(interactive=True))
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        keyboard.send_text(typed + "\x04")
        talk(chat, prompt_session(chat).prompt)
    assert [messages[-1]["content"] for messages in model.seen] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("/re", ["/reset", "/retry"]), ("/set top", ["top_k", "top_p"]), ("/adapter m", ["medical"]), ("你/re", [])],
)
def test_completion(text: str, expected: list[str]) -> None:
    chat = Chat([FakeChatModel(adapters=("medical",))], GenerationOptions(), Screen(interactive=True))
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        completer = prompt_session(chat).completer
    assert [item.text for item in completer.get_completions(Document(text), None)] == expected


class Keyboard:
    """Types into a program in a terminal of its own, and reads what it shows."""

    def __init__(self, script: str, **environment: str) -> None:
        self._shown = b""
        self._terminal, its_side = pty.openpty()
        environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=its_side,
            stdout=its_side,
            stderr=its_side,
            env=os.environ | environment,
            start_new_session=True,
        )
        os.close(its_side)

    def wait_for(self, text: str) -> str:
        """What is shown from here up to a text."""
        deadline = time.monotonic() + 60
        while text.encode() not in self._shown:
            ready, _, _ = select.select([self._terminal], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} does not come after {self._shown!r}"
            self._shown += os.read(self._terminal, 4096)
        shown, _, self._shown = self._shown.partition(text.encode())
        return shown.decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)


def test_a_chat_in_a_terminal(tmp_path: Path) -> None:
    keyboard = Keyboard(SCRIPT, XDG_STATE_HOME=str(tmp_path), LC_ALL="C.UTF-8")
    try:
        keyboard.wait_for(PROMPT)
        keyboard.type("你号\x7f好a\r")
        keyboard.wait_for("fake:你好a")
        keyboard.wait_for(PROMPT)
        keyboard.type("wait\r")
        keyboard.wait_for("beginning")
        keyboard.type("\x03")
        keyboard.wait_for(PROMPT)
        keyboard.type("gone\x03")
        keyboard.wait_for(PROMPT)
        keyboard.type("\x04")
        shown = keyboard.wait_for(" 0\r\n")
    finally:
        keyboard.close()
    first, second = ["你好a"], ["你好a", "fake:你好a", "wait"]
    assert f"seen {[first, second]!a}" in shown
    history = tmp_path / "fm9g" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+你好a" in history.read_text(encoding="utf-8")
