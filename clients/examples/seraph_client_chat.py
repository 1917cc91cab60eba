"""A conversation in the terminal with seraph_client: answers appear as they are written; an empty line ends it.

SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... python clients/examples/seraph_client_chat.py
"""

from __future__ import annotations

import os
import sys

from seraph_client import Client, Message, SeraphClientError

MAX_TOKENS = 256


def main() -> int:
    base_url = os.environ.get("SERAPH_BASE_URL", "http://127.0.0.1:8000")
    messages: list[Message] = []
    with Client(base_url, api_key=os.environ.get("SERAPH_API_KEY")) as client:
        while question := _ask():
            messages.append({"role": "user", "content": question})
            answer = ""
            try:
                with client.stream_chat(messages, max_tokens=MAX_TOKENS) as stream:
                    for chunk in stream:
                        print(chunk.text, end="", flush=True)
                        answer += chunk.text
            except KeyboardInterrupt:
                pass  # leaving the block has stopped the server; what came is kept
            except SeraphClientError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
            print()
            messages.append({"role": "assistant", "content": answer})
    return 0


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


if __name__ == "__main__":
    sys.exit(main())
