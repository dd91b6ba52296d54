"""Encoding conversations, compared with transformers' apply_chat_template on the same records and one core.

    python benchmarks/data/chats.py [--repeat 3]

transformers returns token ids only; fm9g also finds the trained tokens, encodes the spelling of a special token as
text, and makes several samples of a conversation if the template rewrites earlier turns. The two alternate; each value
is the best of the rounds.
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
    """Thousand tokens per second."""
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
    from fm9g.data.encode.tokenizer_loading import load_tokenizer
    from fm9g.data.encode.tokenizer_training import train_tokenizer

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

            def ours(batch: list[dict], encoder: Encoder = encoder) -> int:
                return sum(map(len, encoder.tokenize([encoder.render(record) for record in batch])))

            def reference(batch: list[dict], text: str = text) -> int:
                chats = [record["messages"] for record in batch]
                return sum(map(len, theirs.apply_chat_template(chats, chat_template=text, return_dict=False)))

            rates = [(rate(ours, records), rate(reference, records)) for _ in range(options.repeat)]
            best_ours, best_reference = (max(column) for column in zip(*rates))
            ratio = best_ours / best_reference
            rows.append([template, f"{best_reference:.0f}", f"{best_ours:.0f}", f"{ratio:.2f}"])
    report(
        f"{len(records)} conversations of two questions, one core",
        table(["template", "apply_chat_template, thousand tokens/s", "fm9g, thousand tokens/s", "ratio"], rows),
    )


if __name__ == "__main__":
    main()
