"""Talks to a server of `fm9g serve` with OpenAI's package.

pip install openai
FM9G_API_KEY=sk-fm9g-... python tools/serve/client.py "Who are you?" --url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse
import os

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description="Asks a server a question, and prints the answer as it comes.")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the server (default: %(default)s)")
    parser.add_argument("--model", default="", help="a model or an adapter (default: the first that the server has)")
    parser.add_argument("--max_tokens", type=int, default=256, help="maximum length of the answer")
    options = parser.parse_args()

    # The package demands a key; a server without keys accepts any.
    client = OpenAI(base_url=options.url, api_key=os.environ.get("FM9G_API_KEY", "none"))
    model = options.model or client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": options.question}],
        max_tokens=options.max_tokens,
        stream=True,
    )
    for chunk in answer:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
