"""The chat with lines from a pipe: conversations, commands, limits of the context, errors."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.fake_chat import FakeChatModel

from fm9g.chat.commands import COMMANDS, help_lines
from fm9g.chat.screen import Screen
from fm9g.chat.session import Chat
from fm9g.chat.terminal import run_chat, run_line, talk
from fm9g.cli import main
from fm9g.errors import UserError
from fm9g.infer.options import GenerationOptions

OPTIONS = GenerationOptions(max_new_tokens=10)
Pipe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pipe:
    """Runs a chat with lines as its standard input: status, standard output, standard error."""

    def run(lines: list[str], *models: FakeChatModel, **arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = run_chat(models, arguments.pop("options", OPTIONS), **arguments)
        return status, *capsys.readouterr()

    return run


def chat_with_a_person() -> Chat:
    """A chat that believes a person is there."""
    return Chat([FakeChatModel()], OPTIONS, Screen(interactive=True))


def contents(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def test_each_line_of_a_pipe_is_a_question_and_the_model_sees_what_came_before(pipe: Pipe) -> None:
    model = FakeChatModel()
    assert pipe(["你好", "", "and you", "//help"], model, system="be kind") == (
        0,
        "fake:你好\nfake:and you\nfake:/help\n",
        "",
    )
    assert model.seen[1] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "fake:你好"},
        {"role": "user", "content": "and you"},
    ]
    assert contents(model.seen[2])[-1] == "/help"


def test_an_answer_is_the_same_without_streaming(pipe: Pipe) -> None:
    assert pipe(["q"], FakeChatModel(), stream=False) == (0, "fake:q\n", "")


def test_what_a_model_says_cannot_act_on_the_terminal(pipe: Pipe) -> None:
    model = FakeChatModel("\x1b[2Jname")
    model.answers["q"] = ["\x1b]0;title\x07\x9b", "a\nb"]
    _status, out, err = pipe(["q", "/adapter"], model)
    assert out.startswith("␛]0;title␇\\u009ba\nb\n")
    assert not any(letter < " " and letter != "\n" for letter in out + err)


def test_commands_change_the_conversation(pipe: Pipe) -> None:
    model = FakeChatModel()
    lines = ["a", "b", "/undo", "c", "/system short", "d", "/system", "/system none", "/reset", "e", "/exit", "f"]
    status, out, err = pipe(lines, model)
    assert (status, err) == (0, "")
    assert "\nshort\n" in out
    assert contents(model.seen[2]) == ["a", "fake:a", "c"]
    assert contents(model.seen[3]) == ["short", "a", "fake:a", "c", "fake:c", "d"]
    assert [contents(seen) for seen in model.seen[4:]] == [["e"]]


def test_retry_replaces_the_answer_and_samples_another_one(pipe: Pipe) -> None:
    model = FakeChatModel()
    pipe(["a", "b", "/retry", "/retry", "c"], model)
    assert contents(model.seen[2]) == contents(model.seen[3]) == ["a", "fake:a", "b"]
    assert [options.seed for options in model.options] == [1234, 1234, 1235, 1236, 1234]
    assert contents(model.seen[4]) == ["a", "fake:a", "b", "fake:b", "c"]


@pytest.mark.parametrize(
    ("error", "message"),
    [(UserError("busy", "try later"), "busy try later\n"), (RuntimeError("CUDA out of memory. x"), "out of mem")],
)
def test_an_error_is_one_line_and_the_question_can_be_sent_again(pipe: Pipe, error: Exception, message: str) -> None:
    model = FakeChatModel()
    model.answers["b"] = ["so", error]
    status, out, err = pipe(["a", "b", "/retry", "/undo", "c"], model)
    assert status == 1
    assert err.count("\n") == 2
    assert err.startswith(message)
    assert "so\n" in out
    assert contents(model.seen[2]) == contents(model.seen[1]) == ["a", "fake:a", "b"]
    assert contents(model.seen[3]) == ["a", "fake:a", "c"]


def test_another_error_is_not_hidden(pipe: Pipe) -> None:
    model = FakeChatModel()
    model.answers["b"] = [RuntimeError("a defect")]
    with pytest.raises(RuntimeError, match="a defect"):
        pipe(["b"], model)


def test_the_oldest_turns_are_left_out_when_the_context_is_full(pipe: Pipe) -> None:
    model = FakeChatModel(max_model_len=22)
    _status, _out, err = pipe(["a 1", "b 2", "c 3", "d 4"], model, system="be kind")
    assert contents(model.seen[2]) == ["be kind", "a 1", "fake:a 1", "b 2", "fake:b 2", "c 3"]
    assert contents(model.seen[3]) == ["be kind", "b 2", "fake:b 2", "c 3", "fake:c 3", "d 4"]
    assert err == "the oldest 1 of 3 questions and their answers are left out: the context of fake is 22 tokens\n"


def test_a_question_that_is_too_long_is_refused_and_one_that_nearly_is_gets_a_shorter_answer(pipe: Pipe) -> None:
    model = FakeChatModel(max_model_len=12)
    status, _out, err = pipe(["w " * 12, "w " * 8], model)
    assert status == 1
    assert err == (
        "the question is too long: with the system prompt it is 12 tokens, and the context of fake is 12; shorten it\n"
    )
    assert [options.max_new_tokens for options in model.options] == [4]


def test_ctrl_c_keeps_the_beginning_of_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    chat = chat_with_a_person()
    model = chat.models[0]
    model.answers["b"] = ["be", "gin", KeyboardInterrupt()]
    for line in ("a", "b", "c"):
        run_line(chat, line)
    assert contents(model.seen[2]) == ["a", "fake:a", "b", "begin", "c"]
    assert model.closed == 3
    assert "stopped" in capsys.readouterr().err


def test_ctrl_c_before_the_answer_leaves_the_question_for_retry() -> None:
    chat = chat_with_a_person()
    model = chat.models[0]
    model.answers["b"] = [KeyboardInterrupt()]
    for line in ("a", "b", "c"):
        run_line(chat, line)
    assert contents(model.seen[2]) == ["a", "fake:a", "c"]


def test_ctrl_c_ends_a_chat_that_reads_a_pipe(pipe: Pipe) -> None:
    model = FakeChatModel()
    model.answers["b"] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        pipe(["b", "c"], model)


def test_ctrl_c_at_the_prompt_clears_the_line_and_ctrl_d_leaves() -> None:
    chat = chat_with_a_person()
    typed = iter([KeyboardInterrupt(), "a", EOFError()])

    def read() -> str:
        item = next(typed)
        if isinstance(item, BaseException):
            raise item
        return item

    talk(chat, read)
    assert contents(chat.models[0].seen[0]) == ["a"]


def test_a_saved_conversation_can_be_indexed_and_loaded(pipe: Pipe, tmp_path: Path) -> None:
    saved, first, second = tmp_path / "对话.jsonl", FakeChatModel(), FakeChatModel()
    assert pipe(["你好", "b", f"/save {saved}", f"/save {saved}"], first, system="s") == (
        1,
        "fake:你好\nfake:b\n",
        f"{saved}: written\n{saved}: exists already; choose another name\n",
    )
    assert len(saved.read_text(encoding="utf-8").splitlines()) == 1
    pipe([f"/load {saved}", "c"], second)
    assert contents(second.seen[0]) == ["s", "你好", "fake:你好", "b", "fake:b", "c"]
    assert main(["data", "index", "--path", str(saved), "--language", "zh", "--output", str(tmp_path / "o")]) == 0


USER, ASSISTANT = '{"role": "user", "content": "q"}', '{"role": "assistant", "content": "a"}'


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, ": no such file"),
        ("", ": is empty"),
        ("[", ", line 1: not JSON"),
        ("[]", ', line 1: expected {"messages": [...]}'),
        ('{"messages": [], "messages": []}', ", line 1: key 'messages' is given twice"),
        (f'{{"messages": [{USER}]}}', ", line 1: expected messages of user and assistant in turn"),
        (f'{{"messages": [{USER}, {ASSISTANT}, 3]}}', ", line 1, message 3: expected an object with role and content"),
        ('{"messages": [{"role": "user", "content": 3}]}', ", line 1, message 1: content: found int, expected a text"),
        (f'{{"messages": [{USER}, {ASSISTANT}]}}\n' * 2, ": has 2 conversations, expected 1"),
        ("\udcff", ": cannot be read"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named_and_the_conversation_goes_on(
    pipe: Pipe, tmp_path: Path, content: str | None, problem: str
) -> None:
    path, model = tmp_path / "c.jsonl", FakeChatModel()
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    status, _out, err = pipe(["a", f"/load {path}", "b"], model)
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith(f"{path}{problem}")
    assert contents(model.seen[1]) == ["a", "fake:a", "b"]


def test_nothing_is_saved_before_the_first_answer(pipe: Pipe, tmp_path: Path) -> None:
    status, _out, err = pipe([f"/save {tmp_path / 'c'}"], FakeChatModel())
    assert (status, "no answer to save" in err, list(tmp_path.iterdir())) == (1, True, [])


def test_adapters(pipe: Pipe) -> None:
    model = FakeChatModel(adapters=("medical", "law"))
    status, out, err = pipe(["/adapter", "/adapter law", "/adapter none", "/adapter lav"], model)
    assert out == "".join(f"{name}; adapters: medical, law\n" for name in ("fake", "fake + law", "fake"))
    assert (status, err) == (1, "adapter lav: unknown\n")


def test_sampling_options(pipe: Pipe) -> None:
    model = FakeChatModel()
    lines = ["/set temperature 0.5", "/set top_k 3", "/set stop \u3002", "q", "/set stop", "q", "/set"]
    status, out, err = pipe(lines, model)
    assert (model.options[0].temperature, model.options[0].top_k, model.options[0].stop) == (0.5, 3, ("。",))
    assert model.options[1].stop == ()
    assert "max_new_tokens      10\n" in out
    assert "logprobs" not in out
    assert (status, err) == (0, "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temprature 1", "/set: temprature: unknown option; did you mean 'temperature'?"),
        ("/set top_k 1.5", "/set: top_k: found '1.5', expected a whole number"),
        ("/set top_p x", "/set: top_p: found 'x', expected a number"),
        ("/set top_p 2", "top_p: found 2.0, which is out of range"),
        ("/retyr", "/retyr: unknown command; did you mean '/retry'?; //TEXT sends a message that begins with a slash"),
        ("/exit now", "/exit: takes no argument"),
        ("/save", "/save: give a file"),
        ("/retry", "there is no question to ask again"),
        ("/undo", "there is no question to take back"),
        ("/compare on", "/compare: there is one model; start the chat with --compare MODEL2"),
    ],
)
def test_a_mistake_is_one_line(pipe: Pipe, line: str, message: str) -> None:
    assert pipe([line], FakeChatModel()) == (1, "", f"{message}\n")


@pytest.mark.parametrize(("language", "word"), [("zh_CN.UTF-8", "退出"), ("en_US.UTF-8", "leave"), ("", "leave")])
def test_the_help_names_each_command(pipe: Pipe, monkeypatch: pytest.MonkeyPatch, language: str, word: str) -> None:
    monkeypatch.setenv("LC_ALL", language)
    monkeypatch.setenv("LANG", language)
    _status, out, _err = pipe(["/help"], FakeChatModel())
    assert out == "\n".join(help_lines()) + "\n"
    assert word in out
    assert all(name in out for name in COMMANDS)


def test_two_models_answer_each_with_its_own_history(pipe: Pipe, tmp_path: Path) -> None:
    one, two, saved = FakeChatModel("one"), FakeChatModel("two"), tmp_path / "c.jsonl"
    lines = ["a", "b", f"/save {saved}", "/compare off", "c", "/compare on", "/reset", f"/load {saved}", "d"]
    status, out, _err = pipe(lines, one, two)
    assert out.startswith("one:\none:a\ntwo:\ntwo:a\n")
    assert "answering: one\none:c\nanswering: one and two\n" in out
    assert contents(one.seen[1]) == ["a", "one:a", "b"]
    assert contents(two.seen[1]) == ["a", "two:a", "b"]
    assert [json.loads(line)["messages"][1]["content"] for line in saved.read_text().splitlines()] == ["one:a", "two:a"]
    assert contents(two.seen[2]) == ["a", "two:a", "b", "two:b", "d"]
    assert status == 0


def test_one_of_two_models_can_fail(pipe: Pipe) -> None:
    one, two = FakeChatModel("one"), FakeChatModel("two")
    one.answers["a"] = [UserError("busy")]
    status, _out, err = pipe(["a", "b"], one, two)
    assert (status, err) == (1, "busy\n")
    assert contents(one.seen[1]) == ["b"]
    assert contents(two.seen[1]) == ["a", "two:a", "b"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("width", "beside"), [(100, True), (99, False)])
def test_two_answers_stand_beside_each_other_if_there_is_room(
    monkeypatch: pytest.MonkeyPatch, width: int, beside: bool
) -> None:
    import wcwidth

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    one, two = FakeChatModel("one"), FakeChatModel("two")
    one.answers["q"] = ["汉字" * 40 + "\n", "\tend\x1b"]
    run_line(Chat([one, two], OPTIONS, Screen(interactive=True)), "q")
    rows = out.getvalue().split("\n")
    assert any("汉" in row and "two:q" in row for row in rows) == beside
    if beside:
        assert all(wcwidth.wcswidth(row.partition("│")[0]) == 49 for row in rows if "│" in row)
        assert sum(row.count("汉") for row in rows) == 40
    assert "end␛" in out.getvalue()


def test_the_generation_has_ended_when_the_user_is_told_that_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, closed = chat_with_a_person(), []
    model = chat.models[0]

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.screen, "write", interrupt)
    monkeypatch.setattr(chat.screen, "note", lambda text: closed.append(model.closed))
    run_line(chat, "a")
    assert closed == [1]
