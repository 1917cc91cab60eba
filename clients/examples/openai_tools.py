"""The OpenAI SDK with a Seraph server: a tool that the model calls, is told the result of, and answers by.

Once whole, then streamed.

SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... python clients/examples/openai_tools.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from openai import OpenAI

RETURNED = {"Paris": "18 degrees, cloudy", "Oslo": "3 degrees, snow", "Lima": "25 degrees, sunny"}
TOOL = {
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


def weather(city: str) -> str:
    return RETURNED[city]


def whole(client: OpenAI, fields: dict[str, Any]) -> dict[str, Any]:
    """The assistant's next message."""
    message: dict[str, Any] = client.chat.completions.create(**fields).choices[0].message.to_dict()
    return message


def streamed(client: OpenAI, fields: dict[str, Any]) -> dict[str, Any]:
    """The same, put together from its chunks: a call's first one has its id and name, each some of its arguments."""
    content = ""
    calls: dict[int, dict[str, Any]] = {}
    for chunk in client.chat.completions.create(stream=True, **fields):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        for part in delta.tool_calls or ():
            if part.id:
                function = {"name": part.function.name, "arguments": ""}
                calls[part.index] = {"id": part.id, "type": "function", "function": function}
            calls[part.index]["function"]["arguments"] += part.function.arguments or ""
    message = {"role": "assistant", "content": content or None}
    return {**message, "tool_calls": list(calls.values())} if calls else message


def converse(client: OpenAI, ask: Callable[[OpenAI, dict[str, Any]], dict[str, Any]]) -> str:
    """Run the calls of the model until it answers in words."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    fields = {
        "model": client.models.list().data[0].id,
        "messages": messages,
        "tools": [TOOL],
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 200,
    }
    # Small models seldom think of calling by themselves, and some do not stop: here the first answer must call, the
    # third may not.
    for choice in ("required", "auto", "none"):
        message = ask(client, {**fields, "tool_choice": choice})
        messages.append(message)
        if not message.get("tool_calls"):
            break
        for call in message["tool_calls"]:
            arguments = json.loads(call["function"]["arguments"])
            print("called:", call["function"]["name"], json.dumps(arguments))
            result = weather(**arguments)
            print("returned:", result)
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    return str(message["content"])


def main() -> None:
    base_url = os.environ.get("SERAPH_BASE_URL", "http://127.0.0.1:8000")
    with OpenAI(base_url=f"{base_url}/v1", api_key=os.environ.get("SERAPH_API_KEY", "none")) as client:
        print("whole:", repr(converse(client, whole)))
        print("streamed:", repr(converse(client, streamed)))


if __name__ == "__main__":
    main()
