"""The page: what it records is training data, and what a person sees in a browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

import fm9g
from fm9g.infer.options import GenerationOptions
from fm9g.serve.page.feedback import add_preference, add_thumb
from fm9g.serve.page.texts import _TEXTS, CHINESE, ENGLISH, LANGUAGES, preferred_language, text

CHROMIUM = next(
    (path for name in ("chromium", "google-chrome", "chromium-browser") if (path := shutil.which(name))), ""
)
PROMPT = [{"role": "system", "content": "be short"}, {"role": "user", "content": "九格是什么"}]


def test_feedback_can_be_indexed_for_preference_training(tmp_path: Path) -> None:
    folder = tmp_path / "feedback"
    add_preference(folder, PROMPT, "好", "差")
    add_preference(folder, PROMPT, "一", "二")
    add_thumb(folder, [*PROMPT, {"role": "assistant", "content": "模型"}], False)
    pairs = [json.loads(line) for line in (folder / "preferences.jsonl").read_text(encoding="utf-8").splitlines()]
    assert pairs[0]["chosen"] == {"role": "assistant", "content": "好"}
    assert pairs[1]["rejected"] == {"role": "assistant", "content": "二"}
    assert json.loads((folder / "thumbs.jsonl").read_text(encoding="utf-8"))["label"] is False
    for name, count in (("preferences", 2), ("thumbs", 1)):
        report = fm9g.build_index(folder / f"{name}.jsonl", tmp_path / name, "zh")
        assert (report.read, report.rejected) == (count, 0)


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_preference(tmp_path, PROMPT, "a", "b")
    before = (tmp_path / "preferences.jsonl").read_bytes()

    own = Path.open

    def open_full(self: Path, mode: str = "r", *given: Any, **more: Any) -> Any:
        file = own(self, mode, *given, **more)
        if mode != "ab":
            return file
        full = MagicMock()
        full.__enter__.return_value.write = lambda line: file.write(line[:10])
        return full

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(OSError, match="No space left"):
        add_preference(tmp_path, PROMPT, "c", "d")
    assert (tmp_path / "preferences.jsonl").read_bytes() == before


def test_each_text_is_there_in_both_languages() -> None:
    assert preferred_language("zh-CN,zh;q=0.9") == CHINESE
    assert preferred_language("de,en;q=0.8") == preferred_language("") == ENGLISH
    for name, texts in _TEXTS.items():
        assert len(texts) == len(LANGUAGES)
        assert all(texts)
        assert texts[0].count("{}") == texts[1].count("{}"), name
    assert text("refused", CHINESE, "x").endswith("x")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A page in front of an engine that a test decides, with a key."""
    pytest.importorskip("gradio")
    from helpers.servers import FakeEngine, running

    from fm9g.serve.app import create_app, engine_backend
    from fm9g.serve.auth import ApiKeys, _hash
    from fm9g.serve.limits import Limits
    from fm9g.serve.page.page import build_page, mount_page
    from fm9g.serve.server import address_of, bind

    limits = Limits(max_queue=3)
    engine = FakeEngine()
    app = create_app(engine_backend(engine, limits, {}), limits, ApiKeys([_hash("right")]))
    with bind("127.0.0.1", 0) as listener:
        url = address_of(listener)
    page = build_page(
        f"{url}/v1", feedback=tmp_path / "feedback", needs_key=True, options=GenerationOptions(20, temperature=0.7)
    )
    mount_page(app, page, "/page")
    with running(app, int(url.rpartition(":")[2])) as served:
        assert served == url
        yield url


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")
def test_a_person_asks_compares_and_votes(address: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(locale="zh-CN", viewport={"width": 1280, "height": 800})
        tab = context.new_page()
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"{address}/page/")
        expect = playwright.expect
        expect(tab.locator("#send")).to_have_text("发送", timeout=30_000)
        box = tab.locator("#question textarea")

        # Without the key the question stays, and one line says why there is no answer.
        box.fill("你好")
        box.press("Enter")
        expect(tab.get_by_text("服务器未接受 API 密钥").first).to_be_visible(timeout=20_000)
        tab.locator("#api-key input").fill("right")
        tab.locator("#api-key input").press("Enter")
        expect(tab.get_by_label("模型", exact=True)).to_have_value("base", timeout=20_000)
        tab.locator("#retry").click()
        expect(tab.locator("#left")).to_contain_text("base0.0 base0.1 base0.2 base0.3", timeout=20_000)
        expect(tab.locator("#left")).to_contain_text("你好")

        # Two models on the same question, and a vote.
        tab.locator("#compare input").check()
        box.fill("再来")
        box.press("Enter")
        expect(tab.locator("#right")).to_contain_text("adapter0.3", timeout=20_000)
        tab.locator("#right-better").click()
        expect(tab.get_by_text("已记录").first).to_be_visible(timeout=20_000)
        pair = json.loads((tmp_path / "feedback" / "preferences.jsonl").read_text(encoding="utf-8"))
        assert pair["messages"][-1] == {"role": "user", "content": "再来"}
        assert pair["chosen"]["content"].startswith("adapter0.0")
        assert pair["rejected"]["content"].startswith("base0.0")

        # The language is a choice; another person sees nothing of this conversation.
        tab.locator("#language").get_by_text("English").click()
        expect(tab.locator("#send")).to_have_text("Send", timeout=20_000)
        other = browser.new_context(locale="en-US").new_page()
        other.goto(f"{address}/page/")
        expect(other.locator("#send")).to_have_text("Send", timeout=30_000)
        assert "你好" not in other.content()
        assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        browser.close()
