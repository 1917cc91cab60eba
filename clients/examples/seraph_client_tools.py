"""Tools with seraph_client: the model calls one, is told its result, and answers by it. Once whole, then streamed.

SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... python clients/examples/seraph_client_tools.py
"""

from __future__ import annotations

import json
import os
import sys

from seraph_client import Answer, ChatOptions, Client, Message, SeraphClientError, Tool, ToolChoice

RETURNED = {"Paris": "18 degrees, cloudy", "Oslo": "3 degrees, snow", "Lima": "25 degrees, sunny"}
TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": list(RETURNED)}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
OPTIONS: ChatOptions = {"tools": [TOOL], "parallel_tool_calls": False, "temperature": 0, "max_tokens": 200}
CHOICES: tuple[ToolChoice, ...] = ("required", "auto", "none")
"""Small models seldom think of calling by themselves, and some do not stop: the first answer must call, the third may
not."""


def weather(city: str) -> str:
    return RETURNED[city]


def main() -> int:
    base_url = os.environ.get("SERAPH_BASE_URL", "http://127.0.0.1:8000")
    with Client(base_url, api_key=os.environ.get("SERAPH_API_KEY")) as client:
        try:
            print("whole:", repr(_converse(client, stream=False)))
            print("streamed:", repr(_converse(client, stream=True)))
        except SeraphClientError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def _converse(client: Client, *, stream: bool) -> str:
    """Run the calls of the model until it answers in words."""
    messages: list[Message] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    for choice in CHOICES:
        answer = _ask(client, messages, {**OPTIONS, "tool_choice": choice}, stream=stream)
        messages.append(answer.message)
        if not answer.tool_calls:
            break
        for call in answer.tool_calls:
            arguments = json.loads(call.arguments)
            print("called:", call.name, json.dumps(arguments))
            result = weather(**arguments)
            print("returned:", result)
            messages.append(call.result(result))
    return answer.text


def _ask(client: Client, messages: list[Message], options: ChatOptions, *, stream: bool) -> Answer:
    if not stream:
        return client.chat(messages, **options)
    with client.stream_chat(messages, **options) as streamed:
        pieces = [call.arguments for chunk in streamed for call in chunk.tool_calls]
        if pieces:
            print("by pieces:", json.dumps("".join(pieces)))
        return streamed.answer()


if __name__ == "__main__":
    sys.exit(main())
