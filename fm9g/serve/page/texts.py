"""The texts of the page, in English and Chinese."""

# ruff: noqa: RUF001 - Chinese has punctuation of its own

from __future__ import annotations

ENGLISH, CHINESE = "English", "中文"
LANGUAGES = (ENGLISH, CHINESE)

# Name of a part -> its text in each language, in the order of LANGUAGES.
_TEXTS: dict[str, tuple[str, str]] = {
    "question_hint": ("Enter sends, Shift-Enter begins a new line", "回车发送，Shift-回车换行"),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "retry": ("Retry", "重试"),
    "undo": ("Undo", "撤销"),
    "clear": ("Clear", "清空"),
    "download": ("Download", "下载对话"),
    "model": ("Model", "模型"),
    "second_model": ("Second model", "第二个模型"),
    "compare": ("Compare two models", "比较两个模型"),
    "left_better": ("Left is better", "左边更好"),
    "right_better": ("Right is better", "右边更好"),
    "settings": ("Settings", "设置"),
    "system": ("System message", "系统消息"),
    "max_new_tokens": ("Maximum length of an answer, in tokens", "回答的最大长度（token）"),
    "temperature": ("Temperature", "温度"),
    "top_p": ("Top p", "Top p"),
    "top_k": ("Top k (0: all)", "Top k（0：全部）"),
    "min_p": ("Min p", "Min p"),
    "repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "seed": ("Seed (-1: a new one each time)", "随机种子（-1：每次不同）"),
    "api_key": ("API key", "API 密钥"),
    "noted": ("Noted, thank you", "已记录，谢谢"),
    "nothing_to_judge": ("There are no two different answers to judge", "没有两个不同的回答可以比较"),
    "different": (
        "The conversations differ before these answers; clear them to compare again",
        "两边此前的对话不同，清空后再比较",
    ),
    "key_refused": (
        "The server did not accept the API key; enter it under Settings",
        "服务器未接受 API 密钥，请在设置中填写",
    ),
    "busy": ("Too many requests wait; try again in a moment", "排队请求过多，请稍后重试"),
    "unreachable": ("The server does not answer; try again later", "服务器没有响应，请稍后重试"),
    "refused": ("The server refused the request: {}", "服务器拒绝了请求：{}"),
    "failed": ("The server could not answer: {}", "服务器无法回答：{}"),
}


def text(name: str, language: str, *values: object) -> str:
    """A text of the page in a language."""
    return _TEXTS[name][LANGUAGES.index(language)].format(*values)


def preferred_language(accepted: str) -> str:
    """The language for a browser. accepted: its Accept-Language header."""
    return CHINESE if accepted.lower().startswith("zh") else ENGLISH
