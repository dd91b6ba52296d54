"""Column mappings on the command line, and in a file."""

import json
from pathlib import Path

import pytest
from helpers.common import write_jsonl
from helpers.indexing import read_dataset

from fm9g.cli import main
from fm9g.data.prepare.column_mapping import ColumnMapping
from fm9g.data.prepare.columns import columns_from_file, columns_from_text
from fm9g.data.prepare.record_formats import BadRecord, canonicalize
from fm9g.errors import UserError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
BAD = {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
RESULT = {"role": "tool", "content": "3"}
PREFERENCE = {"messages": [USER], "chosen": ANSWER, "rejected": BAD}


def chat(*turns: dict, **extra: object) -> dict:
    return {"messages": list(turns), **extra}


COLUMNS = [
    ("prompt=question,response=answer", {"question": "q", "answer": "a", "id": 1}, {"input": "q", "output": "a"}),
    ("instruction=i, query = c ,output=o", {"i": "q", "c": "x", "o": "a"}, {"input": "q\nx", "output": "a"}),
    ("input=q,output=a,system=s", {"q": "q", "a": "a", "s": "s"}, chat(SYSTEM, USER, ANSWER)),
    ("prompt=q,response=a,system=s", {"q": "q", "a": "a"}, {"input": "q", "output": "a"}),
    ("text=raw_content", {"raw_content": "a", "input": "no", "output": "no"}, {"input": "", "output": "a"}),
    ("conversations=dialog,tools=t", {"dialog": [HUMAN, ANSWER], "t": [TOOL]}, chat(USER, ANSWER, tools=[TOOL])),
    ("messages=m,kto_tag=good", {"m": [USER, ANSWER], "good": True}, chat(USER, ANSWER, label=True)),
    ("prompt=q,chosen=win,rejected=lose", {"q": "q", "win": "a", "lose": "b"}, PREFERENCE),
    ("messages=m,chosen=win,rejected=lose", {"m": [USER], "win": GPT, "lose": "b"}, PREFERENCE),
]


@pytest.mark.parametrize(("text", "record", "expected"), COLUMNS)
def test_columns_name_the_keys(text: str, record: dict, expected: dict) -> None:
    assert canonicalize(record, columns_from_text(text)) == ("columns", expected)


def test_columns_that_name_the_canonical_keys_keep_the_record() -> None:
    record = {"input": "q", "output": "a"}
    assert canonicalize(record, columns_from_text("prompt=input,response=output"))[1] is record


def test_messages_about_columns_name_the_users_keys() -> None:
    columns = columns_from_text("prompt=question,response=answer")
    with pytest.raises(BadRecord, match=r"^question: missing; found the keys qestion, answer$"):
        canonicalize({"qestion": "q", "answer": "a"}, columns)
    with pytest.raises(BadRecord, match=r"^answer: found nothing, expected a string$"):
        canonicalize({"question": "q", "answer": None}, columns)


NAMES = "prompt, query, response, system, history, text, messages, tools, chosen, rejected, label"
KNOWN = f"{NAMES}, instruction, input, output, conversations, kto_tag"
NO_RECORD = (
    "is not enough for a record; name text, or messages, or prompt and response, or chosen and rejected with messages "
    "or prompt; query, system, history, tools, label are optional"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt", "--columns: 'prompt' is not NAME=KEY; write, for example, prompt=question,response=answer"),
        ("prompt=a,", "--columns: '' is not NAME=KEY; write, for example, prompt=question,response=answer"),
        (
            "prompt=a,prompt=b",
            "--columns: 'prompt=b' names a column twice; write, for example, prompt=question,response=answer",
        ),
        ("prompt=a,input=b", "--columns: input is another word for prompt, which is given too; keep one of them"),
        ("promt=a,response=b", f"--columns: unknown name 'promt'; did you mean 'prompt'? (known: {KNOWN})"),
        ("images=a", f"--columns: unknown name 'images'; fm9g trains on text only (known: {KNOWN})"),
        ("prompt=a", f"--columns: prompt {NO_RECORD}"),
        ("text=a,system=b", f"--columns: text, system {NO_RECORD}"),
    ],
)
def test_a_mistake_in_columns_is_named(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        columns_from_text(text)
    assert str(error.value) == message


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_file_of_columns_may_have_tags(tmp_path: Path) -> None:
    names = {"prompt": "question", "response": "answer"}
    assert columns_from_file(write(tmp_path / "a.json", names)) == ColumnMapping(names)
    assert columns_from_file(write(tmp_path / "a.json", {"columns": names})) == ColumnMapping(names)
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A", "function_tag": "C"}
    columns = columns_from_file(write(tmp_path / "a.json", {"columns": {"messages": "dialog"}, "tags": tags}))
    turns = [{"who": "U", "says": "q"}, {"who": "C", "says": json.dumps(CALL)}, {"who": "tool", "says": "3"}]
    assert canonicalize({"dialog": [*turns, {"who": "A", "says": "a"}]}, columns)[1] == chat(
        USER, CALLING, RESULT, ANSWER
    )


def test_tags_win_over_our_own_names_of_roles() -> None:
    columns = ColumnMapping({"messages": "messages"}, {"user_tag": "assistant", "assistant_tag": "user"})
    record = chat({"role": "assistant", "content": "q"}, {"role": "user", "content": "a"})
    assert canonicalize(record, columns)[1] == chat(USER, ANSWER)


@pytest.mark.parametrize(
    ("tags", "turn"),
    [
        ({"role_tag": "from"}, {"from": "user", "value": "q"}),
        ({"role_tag": "who"}, {"who": "user", "content": "q"}),
        ({"content_tag": "value"}, {"from": "user", "value": "q"}),
        ({"content_tag": "says"}, {"role": "user", "says": "q"}),
    ],
)
def test_one_tag_leaves_the_other_key_what_it_is_without_tags(tags: dict[str, str], turn: dict) -> None:
    record = {"messages": [turn], "chosen": "a", "rejected": "b"}
    names = {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}
    assert canonicalize(record, ColumnMapping(names, tags))[1] == PREFERENCE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"promt": "a"}, f"unknown name 'promt'; did you mean 'prompt'? (known: {KNOWN})"),
        ({"text": 3}, "text: found 3, expected a string that is not empty"),
        ({"columns": {"text": ""}}, "columns: text: found '', expected a string that is not empty"),
        ({"columns": {"text": "a"}, "tag": {}}, "unknown name 'tag'; did you mean 'tags'? (known: columns, tags)"),
        ({"columns": {"text": "a"}, "tags": 3}, "tags: found 3, expected an object"),
        (
            {"columns": {"messages": "m"}, "tags": {"usr_tag": "U"}},
            "tags: unknown name 'usr_tag'; did you mean 'user_tag'? (known: system_tag, user_tag, assistant_tag, "
            "observation_tag, function_tag, role_tag, content_tag)",
        ),
    ],
)
def test_a_mistake_in_a_file_of_columns_is_named(tmp_path: Path, content: dict, message: str) -> None:
    path = write(tmp_path / "columns.json", content)
    with pytest.raises(UserError) as error:
        columns_from_file(path)
    assert str(error.value) == f"{path}: {message}"


def test_other_keys_are_mapped_or_kept_as_they_are(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"Question": "q", "Complex_CoT": "c", "Response": "r"}])
    arguments = ["data", "index", "--path", str(source), "--language", "en", "--output"]
    assert main([*arguments, str(tmp_path / "no")]) == 2
    assert main([*arguments, str(tmp_path / "a"), "--columns", "prompt=Question,response=Response"]) == 0
    assert read_dataset(tmp_path / "a") == [{"input": "q", "output": "r"}]
    (tmp_path / "columns.json").write_text('{"prompt": "Question", "response": "Response"}')
    assert main([*arguments, str(tmp_path / "b"), "--columns", str(tmp_path / "columns.json")]) == 0
    assert read_dataset(tmp_path / "b") == read_dataset(tmp_path / "a")
    assert main([*arguments, str(tmp_path / "c"), "--as-is"]) == 0
    assert read_dataset(tmp_path / "c") == [{"Question": "q", "Complex_CoT": "c", "Response": "r"}]
