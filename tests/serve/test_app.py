"""The HTTP application, through the client of OpenAI."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

import httpx  # noqa: E402
from helpers.servers import FakeEngine, running  # noqa: E402

from fm9g.serve.app import create_app, engine_backend  # noqa: E402
from fm9g.serve.auth import ApiKeys, _hash  # noqa: E402
from fm9g.serve.limits import Limits  # noqa: E402

HELLO = [{"role": "user", "content": "hello you"}]
KEYS = ApiKeys([_hash("right")])


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def address(engine: FakeEngine) -> Iterator[str]:
    limits = Limits(max_body_bytes=2000, max_queue=3, max_choices=4, request_timeout=20)
    with running(create_app(engine_backend(engine, limits, {"top_k": 7}), limits, KEYS)) as url:
        yield url
    assert engine.is_closed


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="right", max_retries=0) as client:
        yield client


def test_models_and_a_chat(client: Any, engine: FakeEngine) -> None:
    assert [model.id for model in client.models.list()] == ["base", "adapter"]
    assert client.models.retrieve("adapter").id == "adapter"
    answer = client.chat.completions.create(model="adapter", messages=HELLO, max_tokens=3, temperature=0, stop=["x"])
    assert answer.choices[0].message.content == "adapter0.0 adapter0.1 adapter0.2 "
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 3, 5)
    ((model, prompt, options),) = engine.requests
    assert (model, prompt) == ("adapter", [1, 1])
    assert (options.max_new_tokens, options.temperature, options.stop, options.top_k) == (3, 0, ("x",), 7)


def test_options_are_those_of_openai_and_of_vllm(client: Any, engine: FakeEngine) -> None:
    more = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2}
    settings: dict[str, Any] = {"messages": HELLO, "model": "base", "top_p": 0.5, "seed": 11}
    client.chat.completions.create(**settings, max_completion_tokens=9, user="me", extra_body=more)
    client.chat.completions.create(messages=HELLO, model="base", presence_penalty=0, logit_bias={})
    first, second = (options for _, _, options in engine.requests)
    assert (first.max_new_tokens, first.top_p, first.seed, first.temperature) == (9, 0.5, 11, 1.0)
    assert (first.top_k, first.min_p, first.repetition_penalty) == (0, 0.1, 1.2)
    client.chat.completions.create(messages=HELLO, model="base")
    assert second.seed != engine.requests[2][2].seed  # without a seed, answers differ
    client.chat.completions.create(messages=HELLO, model="base", seed=1234)
    assert engine.requests[3][2].seed == 1234


def test_several_answers_with_log_probabilities(client: Any) -> None:
    answer = client.chat.completions.create(
        model="base", messages=HELLO, n=2, max_tokens=2, logprobs=True, top_logprobs=2
    )
    assert [choice.message.content for choice in answer.choices] == ["base0.0 base0.1 ", "base1.0 base1.1 "]
    entry = answer.choices[1].logprobs.content[1]
    assert (entry.token, entry.logprob, entry.bytes) == ("1 ", -0.5, [49, 32])
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [("1 ", -0.5), ("9 ", -1.0)]
    text = client.completions.create(model="base", prompt=["a", "b"], n=2, max_tokens=1, logprobs=1)
    assert [choice.index for choice in text.choices] == [0, 1, 2, 3]
    assert text.choices[3].logprobs.top_logprobs == [{"0 ": -0.5}]
    assert text.usage.completion_tokens == 4
    assert client.completions.create(model="base", prompt=[5, 6]).usage.prompt_tokens == 2


def test_a_stream_has_the_text_the_reason_and_the_usage(client: Any) -> None:
    chunks = list(
        client.chat.completions.create(
            model="base", messages=HELLO, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    texts: dict[int, str] = {}
    reasons = {}
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason
    assert texts == {n: "".join(f"base{n}.{number} " for number in range(4)) for n in (0, 1)}
    assert reasons == {0: "stop", 1: "stop"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 8)
    parts = [chunk.choices[0].text for chunk in client.completions.create(model="base", prompt="a", stream=True)]
    assert "".join(parts) == "base0.0 base0.1 base0.2 base0.3 "


def test_messages_and_tools_reach_the_template(client: Any, engine: FakeEngine) -> None:
    tool: Any = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
    messages: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "short"}]},
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    client.chat.completions.create(model="base", messages=messages, tools=[tool])
    client.chat.completions.create(model="base", messages=messages, tools=[tool], tool_choice="none")
    (given, tools), (_, no_tools) = engine.chats
    assert given[0] == {"role": "system", "content": "be short"}
    assert given[2]["tool_calls"][0]["function"]["arguments"] == {"zone": "UTC"}
    assert given[3] == {"role": "tool", "content": "noon", "tool_call_id": "c1"}
    assert (list(tools), no_tools) == ([tool], None)


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"messages": []}, "messages", "expected at least one message"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages", r"messages\[0\].role: found 'boss'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "found 3, expected a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "this model reads texts alone",
        ),
        ({"messages": [{"role": "user", "content": "refused"}]}, "messages", "roles must alternate"),
        ({"temperature": "hot"}, "temperature", "found 'hot', expected a number"),
        ({"temperature": -1}, "temperature", "out of range"),
        ({"top_p": 0}, "top_p", "out of range"),
        ({"max_tokens": 0}, "max_tokens", "out of range"),
        ({"max_tokens": 49}, "messages", "context is 50 tokens, but the prompt has 2 and the answer may have 49"),
        ({"n": 5, "seed": 1}, "n", "5 continuations are more than 4"),
        ({"n": 2, "temperature": 0}, "n", "would all be the same"),
        ({"stop": [""]}, "stop", "expected a text"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "with stream true"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty", "0.5 is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"tool_choice": "required"}, "tool_choice", "expected none or auto"),
        ({"extra_body": {"beam": 3}}, "beam", "this server knows no such field"),
        ({"temperature": 10**400}, "temperature", "expected a number"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages", "found 5, expected a list"),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages", "expected objects with function.name"),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options", "expected include_usage"),
    ],
)
def test_a_wrong_field_is_named(client: Any, changes: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(**{"model": "base", "messages": HELLO, **changes})
    assert caught.value.param == param


def test_other_errors_have_the_shape_that_clients_know(client: Any, address: str, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError, match="model: 'gpt' is unknown; this server has base, adapter"):
        client.chat.completions.create(model="gpt", messages=HELLO)
    with pytest.raises(openai.InternalServerError, match="the generation failed: out of order"):
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "FAIL"}])
    with pytest.raises(openai.APIError, match="the generation failed: out of order"):
        list(client.completions.create(model="base", prompt="FAIL", stream=True))
    engine.num_waiting = 3
    with pytest.raises(openai.RateLimitError, match="3 requests wait already") as caught:
        client.completions.create(model="base", prompt="a")
    assert caught.value.response.headers["Retry-After"] == "5"
    engine.num_waiting = 0
    right = {"Authorization": "Bearer right"}
    large = httpx.post(f"{address}/v1/completions", content=b"x" * 3000, headers=right)
    chunked = httpx.post(f"{address}/v1/completions", content=iter([b"x" * 1500] * 2), headers=right)
    assert (large.status_code, chunked.status_code) == (413, 413)
    for body in (b"{", b"\xff", b'{"\\ud800": 1}', b"[" * 1900):
        broken = httpx.post(f"{address}/v1/completions", content=body, headers=right)
        assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")
    assert httpx.get(f"{address}/nothing", headers=right).json()["error"]["message"] == "GET /nothing: Not Found"
    assert httpx.get(f"{address}/v1/completions", headers=right).status_code == 405
    engine.failure = "out of memory"
    with pytest.raises(openai.InternalServerError, match="nothing can be generated: out of memory") as failed:
        client.completions.create(model="base", prompt="a")
    assert failed.value.status_code == 503
    assert httpx.get(f"{address}/health").json() == {"status": "out of memory"}


def test_a_request_writes_one_line_without_control_characters(
    address: str, caplog: pytest.LogCaptureFixture, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "fm9g")
    httpx.get(f"{address}/v1/%0Aforged")
    monkeypatch.setattr(FakeEngine, "model_names", None)  # a mistake of the server
    answer = httpx.get(f"{address}/v1/models", headers={"Authorization": "Bearer right"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    lines = [message for message in caplog.messages if message.startswith("GET")]
    assert lines[0].startswith("GET /v1/␊forged 401") or "\\n" in lines[0]
    assert lines[1].startswith("GET /v1/models 500")
    assert not any("\n" in line for line in lines)


def test_keys_are_asked_for_everywhere_but_for_the_health(address: str) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="needs an API key"):
            client.models.list()
    for path in ("/metrics", "/v1/models"):
        answer = httpx.get(address + path)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_what_is_counted(client: Any, address: str) -> None:
    client.completions.create(model="base", prompt="a b", max_tokens=3)
    list(client.completions.create(model="base", prompt="a", max_tokens=2, stream=True))
    lines = httpx.get(f"{address}/metrics", headers={"Authorization": "Bearer right"}).text.splitlines()
    for line in (
        'fm9g_requests_total{path="/v1/completions",status="200"} 2.0',
        "fm9g_prompt_tokens_total 3.0",
        "fm9g_generated_tokens_total 5.0",
        "fm9g_time_to_first_token_seconds_count 2.0",
        "fm9g_running 0.0",
    ):
        assert line in lines


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(address: str, engine: FakeEngine, stream: bool) -> None:
    body = json.dumps({"model": "base", "prompt": "BLOCK", "stream": stream}).encode()
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        head = (
            "POST /v1/completions HTTP/1.1",
            "Host: x",
            "Authorization: Bearer right",
            f"Content-Length: {len(body)}",
        )
        connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
        assert engine.entered.wait(10)
        assert engine.num_running == 1
    assert engine.left.wait(10)
    assert engine.num_running == 0


def test_a_request_that_takes_too_long_is_ended(engine: FakeEngine) -> None:
    limits = dataclasses.replace(Limits(), request_timeout=0.2)
    with running(create_app(engine_backend(engine, limits, {}), limits, ApiKeys([]))) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError, match=r"the answer took more than 0.2 s") as caught:
                client.completions.create(model="base", prompt="BLOCK")
            assert caught.value.status_code == 504
            with pytest.raises(openai.APIError, match=r"the answer took more than 0.2 s"):
                list(client.completions.create(model="base", prompt="BLOCK", stream=True))
    assert engine.num_running == 0
