"""The commands of the chat. Each is a line that begins with a slash."""

# ruff: noqa: RUF001 - Chinese has its own punctuation

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from fm9g.chat.conversation import load_conversations, save_conversations
from fm9g.chat.session import Chat, label
from fm9g.config.fields import did_you_mean
from fm9g.errors import UserError
from fm9g.infer.options import GenerationOptions
from fm9g.text_table import text_table

OPTIONS = [item.name for item in fields(GenerationOptions) if item.name not in ("num_return_sequences", "logprobs")]


class Command(NamedTuple):
    """A command: what runs it, its argument, and its help in English and Chinese."""

    run: Callable[[Chat, str], None]
    argument: str
    english: str
    chinese: str


def run_command(chat: Chat, line: str) -> None:
    """Runs a line that begins with a slash. Raises UserError for an unknown command or a wrong argument."""
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        hint = did_you_mean(name, list(COMMANDS)) or "; /help lists the commands"
        raise UserError(f"{name}: unknown command{hint}; //TEXT sends a message that begins with a slash")
    if argument.strip() and not COMMANDS[name].argument:
        raise UserError(f"{name}: takes no argument")
    COMMANDS[name].run(chat, argument.strip())


def is_chinese() -> bool:
    """Whether the environment asks for Chinese."""
    return (os.environ.get("LC_ALL") or os.environ.get("LANG") or "").lower().startswith("zh")


def help_lines() -> list[str]:
    """One line for each command, and for each key."""
    rows = [
        (f"{name} {command.argument}".rstrip(), command.chinese if is_chinese() else command.english)
        for name, command in COMMANDS.items()
    ]
    return text_table(rows + [(key, texts[is_chinese()]) for key, texts in _KEYS.items()])


def completions(chat: Chat) -> Mapping[str, list[str]]:
    """Commands, and the arguments that each can be given."""
    known: dict[str, list[str]] = {name: [] for name in COMMANDS}
    return known | {"/set": OPTIONS, "/adapter": ["none", *_adapters(chat)], "/compare": ["on", "off"]}


def _help(chat: Chat, argument: str) -> None:
    chat.screen.line("\n".join(help_lines()))


def _system(chat: Chat, argument: str) -> None:
    if not argument:
        chat.screen.line(chat.conversations[0].system or "there is no system prompt")
        return
    for conversation in chat.conversations:
        conversation.system = "" if argument == "none" else argument


def _reset(chat: Chat, argument: str) -> None:
    for conversation in chat.conversations:
        conversation.turns, conversation.unanswered = [], ""


def _undo(chat: Chat, argument: str) -> None:
    if not any(conversation.turns or conversation.unanswered for conversation in chat.conversations):
        raise UserError("there is no question to take back")
    for conversation in chat.conversations:
        if conversation.unanswered:
            conversation.unanswered = ""
        else:
            del conversation.turns[-1:]


def _retry(chat: Chat, argument: str) -> None:
    chat.retry()


def _save(chat: Chat, argument: str) -> None:
    path = _path("/save", argument)
    save_conversations(path, chat.conversations)
    chat.screen.note(f"{path}: written")


def _load(chat: Chat, argument: str) -> None:
    path, count = _path("/load", argument), len(chat.active)
    found = load_conversations(path)
    if len(found) not in (1, count):
        raise UserError(f"{path}: has {len(found)} conversations, expected {'1' if count == 1 else '1 or 2'}")
    chat.replace_conversations(found if len(found) == count else [deepcopy(found[0]) for _ in range(count)])
    chat.screen.note(f"{path}: {len(found[0].turns)} questions and answers")


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise UserError(f"{command}: give a file")
    return Path(os.path.expanduser(argument))


def _adapters(chat: Chat) -> list[str]:
    return list(dict.fromkeys(name for model in chat.models for name in model.adapters))


def _adapter(chat: Chat, argument: str) -> None:
    if argument:
        name = "" if argument == "none" else argument
        having = [model for model in chat.active if not name or name in model.adapters]
        for model in having or chat.active[:1]:
            model.use_adapter(name)
    for model in chat.active:
        chat.screen.line(f"{label(model)}; adapters: {', '.join(model.adapters) or 'none'}")


def _set(chat: Chat, argument: str) -> None:
    if not argument:
        rows = [(name, repr(getattr(chat.options, name))) for name in OPTIONS]
        chat.screen.line("\n".join(text_table(rows)))
        return
    key, _, text = argument.partition(" ")
    if key not in OPTIONS:
        raise UserError(f"/set: {key}: unknown option{did_you_mean(key, OPTIONS) or '; /set lists them'}")
    default = getattr(GenerationOptions(), key)
    if isinstance(default, tuple):
        value: object = (text.strip(),) if text.strip() else ()
    else:
        kind = type(default)
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise UserError(f"/set: {key}: found {text!r}, expected {wanted}") from None
    chat.options = replace(chat.options, **{key: value})  # type: ignore[arg-type]


def _compare(chat: Chat, argument: str) -> None:
    if len(chat.models) < 2:
        raise UserError("/compare: there is one model; start the chat with --compare MODEL2")
    if argument not in ("", "on", "off"):
        raise UserError(f"/compare: found {argument!r}, expected on or off")
    chat.is_comparing = argument == "on" if argument else chat.is_comparing
    chat.screen.line(f"answering: {' and '.join(label(model) for model in chat.active)}")


def _exit(chat: Chat, argument: str) -> None:
    chat.done = True


COMMANDS = {
    "/help": Command(_help, "", "show this help", "显示本帮助"),
    "/system": Command(
        _system, "[TEXT]", "show or set the system prompt; none: remove it", "查看或设置系统提示词；none 表示删除"
    ),
    "/reset": Command(_reset, "", "forget all questions and answers", "清空对话（保留系统提示词）"),
    "/undo": Command(_undo, "", "forget the last question and its answer", "撤销上一轮问答"),
    "/retry": Command(_retry, "", "ask the last question again", "重新回答上一个问题"),
    "/save": Command(_save, "FILE", "save the conversation as one line of JSON", "把对话保存为一行 JSON"),
    "/load": Command(_load, "FILE", "go on with a saved conversation", "载入已保存的对话"),
    "/adapter": Command(
        _adapter, "[NAME]", "show the adapters, or switch; none: the model alone", "查看或切换适配器；none 表示不使用"
    ),
    "/set": Command(_set, "[KEY VALUE]", "show or change sampling options", "查看或修改采样参数"),
    "/compare": Command(_compare, "[on|off]", "with two models: whether both answer", "有两个模型时：是否两个都回答"),
    "/exit": Command(_exit, "", "leave", "退出"),
}
_KEYS = {
    "//TEXT": ("send a message that begins with a slash", "发送以斜杠开头的消息"),
    "Alt-Enter": ("new line", "换行"),
    "Ctrl-C": ("stop the answer; at the prompt: clear the line", "停止当前回答；输入时清空本行"),
    "Ctrl-D": ("leave", "退出"),
}
