"""Measures servers under load: tokens per second, time to the first token, memory, for both backends in one run.

The model is a Llama of random weights. Each client sends one request after the other; all answers have the same length.

python benchmarks/serve/load.py [--vllm_executable PATH] [--clients 1 8 64] [--tokens 32] [--hidden_size 512]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import httpx

from fm9g.api import train_tokenizer
from fm9g.quickstart import library_sources

VOCAB_SIZE, PROMPT_TOKENS = 8000, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm_executable", default="", help="also measure vLLM: its program, or its python")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        parameters = make_model(folder, options.hidden_size, options.layers)
        print(f"{parameters / 1e6:.0f} M parameters, {PROMPT_TOKENS} tokens of prompt, {options.tokens} of answer\n")
        print("| backend | clients | tokens/s | first token, median (95 %) | peak memory |")
        print("|---|---|---|---|---|")
        backends = {"transformers": []}
        if options.vllm_executable:
            backends["vllm"] = ["--backend", "vllm", "--vllm_executable", options.vllm_executable]
        for backend, words in backends.items():
            with server(folder, [*words, "--dtype", "fp32", "--max_num_seqs", "64"], Path(name)) as (address, pid):
                asyncio.run(load(address, 1, 1, options.tokens))  # warms up
                for clients in options.clients:
                    rate, first = asyncio.run(load(address, clients, options.requests, options.tokens))
                    late = first[min(int(0.95 * len(first)), len(first) - 1)]
                    print(
                        f"| {backend} | {clients} | {rate:.0f} | {statistics.median(first):.2f} s ({late:.2f} s) "
                        f"| {peak_bytes(pid) / 1e9:.2f} GB |",
                        flush=True,
                    )


def make_model(folder: Path, hidden_size: int, layers: int) -> int:
    """Writes a Llama of random weights with a tokenizer; returns the number of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = folder.with_suffix(".txt")
    text.write_text("\n".join(file.read_text(errors="replace") for file in library_sources()[:200]))
    train_tokenizer(text, VOCAB_SIZE, folder)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64, num_key_value_heads=hidden_size // 128, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return int(model.num_parameters())


@contextmanager
def server(model: Path, words: list[str], folder: Path):
    """Starts `fm9g serve`; gives its address and process id."""
    command = [sys.executable, "-m", "fm9g", "serve", str(model), "--port", "0", "--vllm_log", str(folder / "vllm.log")]
    process = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert " at http" in line, line
        yield line.partition(" at ")[2].partition("/v1")[0], process.pid
    finally:
        process.terminate()
        process.wait()


async def load(address: str, clients: int, requests: int, tokens: int) -> tuple[float, list[float]]:
    """Tokens per second of all clients together, and the seconds to each first token in order."""
    first: list[float] = []
    source = random.Random(clients)
    total = 0

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal total
        for _ in range(requests):
            prompt = [source.randrange(2, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)]
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
            body["stream_options"] = {"include_usage": True}
            started, seen = time.monotonic(), False
            async with http.stream("POST", f"{address}/v1/completions", json=body) as answer:
                assert answer.status_code == 200, await answer.aread()
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        content = json.loads(line[6:])
                        if content["choices"] and not seen:
                            seen = True
                            first.append(time.monotonic() - started)
                        if content.get("usage"):
                            total += content["usage"]["completion_tokens"]

    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as http:
        started = time.monotonic()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return total / (time.monotonic() - started), sorted(first)


def peak_bytes(pid: int) -> int:
    """Peak resident memory of a process and its children."""
    total, found = 0, [pid]
    for each in found:
        status = Path(f"/proc/{each}/status").read_text()
        total += 1024 * int(status.partition("VmHWM:")[2].split()[0])
        found += [int(child) for task in Path(f"/proc/{each}/task").iterdir()
                  for child in (task / "children").read_text().split()]  # fmt: skip
    return total


if __name__ == "__main__":
    main()
