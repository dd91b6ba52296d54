"""The chat in a terminal, or with lines from a pipe."""

# ruff: noqa: RUF001 - Chinese has its own punctuation

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fm9g.chat.commands import completions, is_chinese, run_command
from fm9g.chat.model import ChatModel
from fm9g.chat.screen import Screen
from fm9g.chat.session import Chat, label
from fm9g.errors import UserError
from fm9g.infer.options import GenerationOptions
from fm9g.printable import raw_stream

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History

_WELCOME = (
    "{names}; /help lists the commands, Ctrl-D leaves",
    "{names}；输入 /help 查看命令，Ctrl-D 退出",
)


def run_chat(models: Sequence[ChatModel], options: GenerationOptions, *, system: str = "", stream: bool = True) -> int:
    """Talks until the user leaves, or the standard input ends.

    Without a terminal, each line of the standard input is a question or a command.

    Args:
        models: one, or two to compare.
        system: the system prompt; empty: none.
        stream: show an answer while it is generated.

    Returns:
        Exit status: 1 if a line from a pipe failed, else 0.
    """
    screen = Screen(sys.stdin.isatty() and (raw_stream(sys.stdout).isatty() or raw_stream(sys.stderr).isatty()))
    chat = Chat(models, options, screen, system, stream)
    if not screen.interactive:
        for line in _lines_of_pipe():
            run_line(chat, line)
            if chat.done:
                break
        return int(chat.failed)
    screen.note(_WELCOME[is_chinese()].format(names=", ".join(label(model) for model in models)))
    talk(chat, prompt_session(chat, history=_history(screen)).prompt)
    return 0


def talk(chat: Chat, read: Callable[[], str]) -> None:
    """Runs what the user types until he leaves.

    Args:
        read: one message of the user. Raises KeyboardInterrupt for Ctrl-C, EOFError for Ctrl-D.
    """
    while not chat.done:
        try:
            run_line(chat, read())
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def run_line(chat: Chat, line: str) -> None:
    """Answers a question, or runs a command. A mistake is shown in one line."""
    text = line.strip()
    if not text:
        return
    try:
        if text.startswith("/") and not text.startswith("//"):
            run_command(chat, text)
        else:
            chat.ask(text.removeprefix("/"))
    except UserError as error:
        chat.failed = True
        chat.screen.error(str(error))


def prompt_session(chat: Chat, history: History | None = None) -> PromptSession[str]:
    """The line editor: Enter sends, Alt-Enter is a new line, Tab completes commands."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app_session
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle

    class CommandCompleter(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            name, space, argument = document.text_before_cursor.partition(" ")
            if not name.startswith("/"):
                return
            known, typed = (completions(chat).get(name, []), argument) if space else (completions(chat), name)
            yield from (Completion(word, -len(typed)) for word in known if word.startswith(typed))

    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))  # and not in a search, which Enter ends
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    out = raw_stream(sys.stdout)
    return PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        completer=CommandCompleter(),
        complete_style=CompleteStyle.READLINE_LIKE,  # a menu would need empty lines below the prompt
        history=history,
        input=get_app_session().input,
        output=create_output(out if out.isatty() else raw_stream(sys.stderr)),
    )


def _history(screen: Screen) -> History:
    """What was typed in former chats, readable by the user alone; only in memory if the file cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(state, "fm9g", "chat_history")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)):
            path.chmod(0o600)
    except OSError as error:
        screen.note(f"{path}: cannot be written ({error.strerror}); what you type is not kept")
        return InMemoryHistory()
    return FileHistory(str(path))


def _lines_of_pipe() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8: {error}") from None
