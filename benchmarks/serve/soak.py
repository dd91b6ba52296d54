"""Many clients for minutes, some of which leave: each answer must be that of the same request alone.

python benchmarks/serve/soak.py MODEL [--clients 64] [--seconds 300] [-- words of fm9g serve]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from load import server

TEXTS = ("def f(x):", "import os", "class Queue:", "the file", "a list of", "九格", "if not", "for each")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("words", nargs="*", help="of fm9g serve")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, server(options.model, options.words, Path(name)) as (address, pid):
        return asyncio.run(soak(address, pid, options.clients, options.seconds))


def all_requests() -> list[dict[str, Any]]:
    """Requests of every kind; each has one answer."""
    samplings: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "seed": 5, "top_p": 0.9},
        {"temperature": 1.2, "seed": 6, "top_k": 40, "repetition_penalty": 1.1, "n": 2},
        {"temperature": 0, "stop": ["\n\n"]},
    ]
    return [
        {"prompt": text, "max_tokens": 8 + 5 * number, **sampling}
        for number, text in enumerate(TEXTS)
        for sampling in samplings
    ]


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> Any:
    answer = await http.post("/v1/completions", json=body)
    return [choice["text"] for choice in answer.json()["choices"]] if answer.status_code == 200 else answer.status_code


async def soak(address: str, pid: int, clients: int, seconds: float) -> int:
    counts: Counter[str] = Counter()
    memory: list[int] = []
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=httpx.Limits(max_connections=None)) as http:
        bodies = all_requests()
        expected = [await ask(http, body) for body in bodies]
        end = time.monotonic() + seconds

        async def client(number: int) -> None:
            source = random.Random(number)
            while time.monotonic() < end:
                index = source.randrange(len(bodies))
                if source.random() < 0.3:
                    counts["left"] += 1
                    async with http.stream("POST", "/v1/completions", json={**bodies[index], "stream": True}) as answer:
                        lines = answer.aiter_lines()
                        for _ in range(source.randrange(6)):
                            await anext(lines, None)
                    continue
                found = await ask(http, bodies[index])
                counts["right" if found == expected[index] else f"wrong: {type(found).__name__}"] += 1

        async def watch() -> None:
            while time.monotonic() < end:
                memory.append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096)
                await asyncio.sleep(seconds / 20)

        await asyncio.gather(watch(), *(client(number) for number in range(clients)))
        await asyncio.sleep(1)
        metrics = (await http.get("/metrics")).text.splitlines()
    left = [line for line in metrics if line.startswith(("fm9g_running", "fm9g_waiting"))]
    marks = [f"{memory[position] / 1e6:.0f} MB" for position in (1, len(memory) // 2, -1)]
    print(
        f"{clients} clients, {seconds:g} s: {dict(counts)}; at the end {', '.join(left)}; memory {' -> '.join(marks)}"
    )
    wrong = sum(count for name, count in counts.items() if name.startswith("wrong"))
    return 1 if wrong or any(not line.endswith(" 0.0") for line in left) else 0


if __name__ == "__main__":
    sys.exit(main())
