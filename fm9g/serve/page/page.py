"""The chat page, in gradio.

The conversation is the value of the chatbot in the browser; the server keeps none. Each session has its own.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
import openai

from fm9g.infer.options import GenerationOptions
from fm9g.serve.page.feedback import add_preference, add_thumb
from fm9g.serve.page.texts import ENGLISH, LANGUAGES, preferred_language, text

Messages = list[dict[str, Any]]

THEME = gr.themes.Soft(
    primary_hue="indigo",
    font=["system-ui", "-apple-system", "Segoe UI", "Noto Sans CJK SC", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
)
CSS = """
footer {display: none !important}
.gradio-container {max-width: 1100px !important; margin: auto}
"""
_DOWNLOAD = """(messages, system) => {
    const before = system.trim() ? [{role: "system", content: system}] : [];
    const plain = before.concat(messages).map(({role, content}) => ({
        role, content: typeof content === "string" ? content : content.map(part => part.text ?? "").join("")}));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify({messages: plain}) + "\\n"], {type: "application/jsonl"}));
    link.download = "conversation.jsonl";
    link.click();
}"""
_NUMBERS: dict[str, tuple[float, float, float]] = {  # option -> smallest, largest, step
    "max_new_tokens": (1, 4096, 1),
    "temperature": (0, 2, 0.05),
    "top_p": (0.05, 1, 0.05),
    "top_k": (0, 200, 1),
    "min_p": (0, 1, 0.01),
    "repetition_penalty": (0.5, 2, 0.05),
}


def build_page(
    base_url: str,
    *,
    feedback: Path,
    needs_key: bool = False,
    system: str = "",
    options: GenerationOptions = GenerationOptions(max_new_tokens=1024, temperature=0.7),
) -> gr.Blocks:
    """The page for an address.

    Args:
        base_url: of the API, with its /v1.
        feedback: folder for what people think of answers.
        needs_key: whether the page asks for an API key, which it passes on and does not keep.
        system: the system message at the beginning.
        options: the settings at the beginning.
    """

    def english(name: str) -> str:
        return text(name, ENGLISH)

    page: gr.Blocks
    with gr.Blocks(title="fm9g", analytics_enabled=False, fill_height=True) as page:
        language = gr.State(ENGLISH)
        with gr.Row(equal_height=True):
            model = gr.Dropdown([], label=english("model"), allow_custom_value=True, scale=3)
            second = gr.Dropdown([], label=english("second_model"), allow_custom_value=True, scale=3, visible=False)
            compare = gr.Checkbox(False, label=english("compare"), scale=2, elem_id="compare")
            choice = gr.Radio(
                list(LANGUAGES), value=ENGLISH, show_label=False, scale=2, elem_id="language", container=False
            )
        with gr.Row():
            left = gr.Chatbot(height="60vh", elem_id="left", show_label=False, buttons=["copy"])
            right = gr.Chatbot(height="60vh", elem_id="right", show_label=False, buttons=["copy"], visible=False)
        with gr.Row(visible=False) as votes:
            left_better = gr.Button(english("left_better"), size="sm", elem_id="left-better")
            right_better = gr.Button(english("right_better"), size="sm", elem_id="right-better")
        with gr.Row(equal_height=True):
            question = gr.Textbox(lines=1, max_lines=8, scale=8, elem_id="question", show_label=False, autofocus=True)
            send = gr.Button(english("send"), variant="primary", scale=1, min_width=90, elem_id="send")
            stop = gr.Button(english("stop"), variant="stop", scale=1, min_width=90, visible=False, elem_id="stop")
        with gr.Row():
            retry, undo, clear, download = (
                gr.Button(english(name), size="sm", min_width=80, elem_id=name)
                for name in ("retry", "undo", "clear", "download")
            )
        with gr.Accordion(english("settings"), open=needs_key) as settings:
            api_key = gr.Textbox(label=english("api_key"), type="password", visible=needs_key, elem_id="api-key")
            system_text = gr.Textbox(system, label=english("system"), lines=2, elem_id="system")
            with gr.Row():
                numbers = [
                    gr.Slider(
                        low, high, min(getattr(options, name), high), label=english(name), step=step, min_width=220
                    )
                    for name, (low, high, step) in _NUMBERS.items()
                ]
                seed = gr.Number(-1, label=english("seed"), precision=0, minimum=-1, min_width=220)

        labelled: list[tuple[Any, str, str]] = [  # component, name of its text, property that shows it
            (model, "model", "label"),
            (second, "second_model", "label"),
            (compare, "compare", "label"),
            (left_better, "left_better", "value"),
            (right_better, "right_better", "value"),
            (question, "question_hint", "placeholder"),
            (send, "send", "value"),
            (stop, "stop", "value"),
            (retry, "retry", "value"),
            (undo, "undo", "value"),
            (clear, "clear", "value"),
            (download, "download", "value"),
            (settings, "settings", "label"),
            (api_key, "api_key", "label"),
            (system_text, "system", "label"),
            *zip(numbers, _NUMBERS, ["label"] * len(numbers)),
            (seed, "seed", "label"),
        ]
        components = [component for component, _, _ in labelled]

        def in_language(chosen: str) -> list[Any]:
            updates: list[dict[str, Any]] = [{shown: text(name, chosen)} for _, name, shown in labelled]
            return [gr.update(**update) for update in updates]

        async def load(request: gr.Request) -> list[Any]:
            chosen = preferred_language(request.headers.get("accept-language", ""))
            return [chosen, chosen, *in_language(chosen)]

        async def find_models(key: str, language: str) -> list[Any]:
            try:
                async with _client(base_url, key) as client:
                    names = [found.id async for found in client.models.list()]
            except openai.OpenAIError as error:
                if key or not needs_key:
                    gr.Warning(_explain(error, language))
                return [gr.skip(), gr.skip()]
            return [gr.update(choices=names, value=names[0]), gr.update(choices=names, value=names[-1])]

        page.load(load, None, [language, choice, *components]).then(find_models, [api_key, language], [model, second])
        choice.change(lambda chosen: [chosen, *in_language(chosen)], choice, [language, *components])
        gr.on([api_key.blur, api_key.submit], find_models, [api_key, language], [model, second])

        def show_second(is_on: bool, messages: Messages) -> list[Any]:
            shown = gr.update(visible=is_on)
            return [shown, shown, gr.update(visible=is_on, value=messages if is_on else [])]

        compare.change(show_second, [compare, left], [second, votes, right])

        def ask(question: str, left: Messages, right: Messages, is_on: bool) -> list[Any]:
            if not question.strip():
                return [question, left, right]
            turn = {"role": "user", "content": question}
            # A question without an answer is replaced, since templates want roles in turn.
            sides = [side[:-1] if side and side[-1]["role"] == "user" else side for side in (left, right or left)]
            return ["", [*sides[0], turn], [*sides[1], turn] if is_on else right]

        settings_of = [system_text, *numbers, seed, api_key, language]

        async def answer(
            left: Messages, right: Messages, is_on: bool, first: str, other: str, *given: Any
        ) -> AsyncIterator[list[Messages]]:
            *chosen, key, language = given
            sides = [(first, _plain(left))] + ([(other, _plain(right))] if is_on else [])
            if not all(messages and messages[-1]["role"] == "user" for _, messages in sides):
                yield [left, right]
                return
            request = _request(*chosen)
            async for texts in _stream_all(base_url, key, sides, request, lambda error: _explain(error, language)):
                shown = [
                    [*messages, {"role": "assistant", "content": answer}] if answer else messages
                    for (_, messages), answer in zip(sides, texts)
                ]
                yield [shown[0], shown[1] if is_on else right]

        both = [left, right]
        asking = [left, right, compare, model, second, *settings_of]
        swap = (lambda: [gr.update(visible=False), gr.update(visible=True)], None, [send, stop])
        swap_back = (lambda: [gr.update(visible=True), gr.update(visible=False)], None, [send, stop])

        def run(start: Any) -> Any:
            """After `start`, answers; the stop button is there while that goes on."""
            running = start.then(*swap).then(answer, asking, both)
            running.then(*swap_back)
            return running

        answers = [
            run(trigger(ask, [question, left, right, compare], [question, left, right]))
            for trigger in (question.submit, send.click)
        ]
        again = retry.click(lambda *sides: [_to_question(side) for side in sides], both, both, cancels=answers)
        answers.append(run(again))
        stop.click(*swap_back, cancels=answers)

        def take_back(left: Messages, right: Messages) -> list[Any]:
            plain = _to_question(left)
            asked = plain[-1]["content"] if plain else ""
            return [plain[:-1], _to_question(right)[:-1], asked]

        undo.click(take_back, both, [*both, question], cancels=answers).then(*swap_back)
        clear.click(lambda: [[], []], None, both, cancels=answers).then(*swap_back)
        download.click(None, [left, system_text], None, js=_DOWNLOAD)

        async def may_judge(key: str, language: str) -> bool:
            """Whether feedback is taken: of those alone who may use the server."""
            try:
                async with _client(base_url, key) as client:
                    await client.models.list()
            except openai.OpenAIError as error:
                gr.Warning(_explain(error, language))
                return False
            return True

        async def thumb(data: gr.LikeData, left: Messages, system: str, key: str, language: str) -> None:
            if not await may_judge(key, language):
                return
            number = data.index if isinstance(data.index, int) else data.index[0]
            add_thumb(feedback, _with_system(_plain(left)[: number + 1], system), bool(data.liked))
            gr.Info(text("noted", language))

        left.like(thumb, [left, system_text, api_key, language], None)

        def vote(better: int) -> Callable[..., Any]:
            async def record(left: Messages, right: Messages, system: str, key: str, language: str) -> list[Any]:
                sides = [_plain(left), _plain(right)]
                ends = [side[-1]["content"] if side and side[-1]["role"] == "assistant" else "" for side in sides]
                if not all(ends) or ends[0] == ends[1]:
                    gr.Warning(text("nothing_to_judge", language))
                    return [left, right]
                if sides[0][:-1] != sides[1][:-1]:  # the answers are to different conversations
                    gr.Warning(text("different", language))
                    return [left, right]
                if not await may_judge(key, language):
                    return [left, right]
                add_preference(feedback, _with_system(sides[better][:-1], system), ends[better], ends[1 - better])
                gr.Info(text("noted", language))
                return [sides[better], sides[better]]  # both go on from the better answer

            return record

        for number, button in enumerate((left_better, right_better)):
            button.click(vote(number), [left, right, system_text, api_key, language], both)
    page.queue(default_concurrency_limit=64)  # as many people at a time; the server behind it has limits of its own
    return page


def mount_page(app: Any, page: gr.Blocks, path: str) -> None:
    """Adds the page to an application."""
    gr.mount_gradio_app(app, page, path=path, theme=THEME, css=CSS, show_error=True, footer_links=[], ssr_mode=False)


def _client(base_url: str, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=base_url, api_key=key or "none", max_retries=0, timeout=600)


async def _stream_all(
    base_url: str,
    key: str,
    sides: Sequence[tuple[str, Messages]],
    request: dict[str, Any],
    explain: Callable[[Exception], str],
) -> AsyncIterator[list[str]]:
    """The answers of all sides so far, whenever one of them has grown."""
    texts = [""] * len(sides)
    grown = asyncio.Event()
    system = request.pop("system")

    async def run(number: int, model: str, messages: Messages) -> None:
        asked: Any = _with_system(messages, system)
        try:
            async with _client(base_url, key) as client:
                stream: Any = await client.chat.completions.create(
                    model=model or "", messages=asked, stream=True, **request
                )
                async for chunk in stream:
                    for choice in chunk.choices:
                        texts[number] += choice.delta.content or ""
                        grown.set()
        except openai.OpenAIError as error:
            gr.Warning(explain(error))

    tasks = [asyncio.create_task(run(number, *side)) for number, side in enumerate(sides)]
    everything = asyncio.gather(*tasks)
    everything.add_done_callback(lambda _: grown.set())
    try:
        while not everything.done():
            await grown.wait()
            grown.clear()
            yield list(texts)
        await everything
        yield list(texts)
    finally:
        for task in tasks:
            task.cancel()


def _request(system: str, *numbers: float) -> dict[str, Any]:
    """The settings of the page as arguments of the client, and the system message."""
    *values, seed = numbers
    chosen = dict(zip(_NUMBERS, values))
    request: dict[str, Any] = {
        "system": system,
        "max_tokens": int(chosen["max_new_tokens"]),
        "temperature": chosen["temperature"],
        "top_p": chosen["top_p"],
        "extra_body": {
            "top_k": int(chosen["top_k"]) or -1,
            "min_p": chosen["min_p"],
            "repetition_penalty": chosen["repetition_penalty"],
        },
    }
    return request | ({"seed": int(seed)} if seed >= 0 else {})


def _plain(messages: Messages) -> Messages:
    """Messages with role and text alone, from what a chatbot of gradio holds."""
    return [{"role": message["role"], "content": _text_of(message["content"])} for message in messages]


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)


def _to_question(messages: Messages) -> Messages:
    """The conversation up to its last question."""
    plain = _plain(messages)
    while plain and plain[-1]["role"] != "user":
        plain.pop()
    return plain


def _with_system(messages: Messages, system: str) -> Messages:
    return [{"role": "system", "content": system}, *messages] if system.strip() else messages


def _explain(error: Exception, language: str) -> str:
    """One line about what went wrong."""
    if isinstance(error, openai.AuthenticationError):
        return text("key_refused", language)
    if isinstance(error, openai.RateLimitError):
        return text("busy", language)
    if isinstance(error, openai.APIConnectionError):
        return text("unreachable", language)
    body = getattr(error, "body", None)
    detail = (body.get("message") if isinstance(body, dict) else None) or str(error)
    return text("refused" if isinstance(error, openai.BadRequestError) else "failed", language, detail)
