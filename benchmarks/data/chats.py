"""Conversations to trained tokens, beside transformers' apply_chat_template on the same records and one core.

    python benchmarks/data/chats.py [--repeat 3]

transformers gives the ids alone; fm9g also finds what is trained on, keeps spellings of special tokens as text, and
makes several samples of a conversation where the template rewrites earlier turns. The two take turns; each figure is
the best of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import records_of, report, table

TEMPLATES = ("chatml", "qwen", "qwen3", "llama")


def rate(encode: Callable[[list[dict]], int], records: list[dict]) -> float:
    """Thousand tokens a second."""
    started = time.monotonic()
    tokens = sum(encode(records[start : start + 64]) for start in range(0, len(records), 64))
    return tokens / (time.monotonic() - started) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    from transformers import AutoTokenizer

    from fm9g.data.encode.encoder import Encoder
    from fm9g.data.encode.template import load_template
    from fm9g.data.encode.tokenizer import load_tokenizer, train_tokenizer

    pairs = [json.loads(line) for line in records_of("alpaca_zh_demo.json", "alpaca_en_demo.json")]
    turns = [
        [{"role": "user", "content": pair["input"]}, {"role": "assistant", "content": pair["output"]}]
        for pair in pairs
        if pair["input"] and pair["output"]
    ]
    records = [{"messages": one + other} for one, other in zip(turns[::2], turns[1::2])]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer((pair["output"] for pair in pairs), 16_000, folder / "bpe")
        markers = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        theirs = AutoTokenizer.from_pretrained(folder / "bpe", extra_special_tokens=markers)
        theirs.save_pretrained(folder / "chat")
        tokenizer = load_tokenizer(folder / "chat")
        for template in TEMPLATES:
            encoder = Encoder(tokenizer, load_template(template, tokenizer))
            text = encoder.template.sources["default"]  # type: ignore[union-attr]

            def ours(some: list[dict], encoder: Encoder = encoder) -> int:
                return sum(map(len, encoder.tokenize([encoder.render(record) for record in some])))

            def reference(some: list[dict], text: str = text) -> int:
                chats = [record["messages"] for record in some]
                return sum(map(len, theirs.apply_chat_template(chats, chat_template=text, return_dict=False)))

            rates = [(rate(ours, records), rate(reference, records)) for _ in range(options.repeat)]
            one, other = (max(some) for some in zip(*rates))
            rows.append([template, f"{other:.0f}", f"{one:.0f}", f"{one / other:.2f}"])
    report(
        f"{len(records)} conversations of two questions, one core",
        table(["template", "apply_chat_template, thousand tokens/s", "fm9g, thousand tokens/s", "ratio"], rows),
    )


if __name__ == "__main__":
    main()
