"""LiteLLM with a Seraph server: a tool that the model calls, is told the result of, and answers by.

Once whole, then streamed.

SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... python clients/examples/litellm_tools.py
"""

from __future__ import annotations

import json
import os
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its table of prices from the package, not the network

import litellm
from openai import OpenAI

litellm.suppress_debug_info = True  # or it prints where it looks for the prices of a model that it does not know

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


def ask(fields: dict[str, Any], *, stream: bool) -> Any:
    """The model's next message."""
    if not stream:
        return litellm.completion(**fields).choices[0].message
    chunks = list(litellm.completion(stream=True, **fields))
    return litellm.stream_chunk_builder(chunks, messages=fields["messages"]).choices[0].message


def converse(server: dict[str, Any], *, stream: bool) -> str:
    """Have the model call the tool, and answer by what that returned."""
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    fields = {**server, "messages": messages, "tools": [TOOL], "temperature": 0, "max_tokens": 200}
    message = ask({**fields, "tool_choice": "required", "parallel_tool_calls": False}, stream=stream)
    messages.append(message)
    for call in message.tool_calls:
        arguments = json.loads(call.function.arguments)
        print("called:", call.function.name, json.dumps(arguments))
        result = RETURNED[arguments["city"]]
        print("returned:", result)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return str(ask({**fields, "tool_choice": "none"}, stream=stream).content)


def main() -> None:
    base_url = os.environ.get("SERAPH_BASE_URL", "http://127.0.0.1:8000") + "/v1"
    api_key = os.environ.get("SERAPH_API_KEY", "none")
    with OpenAI(base_url=base_url, api_key=api_key) as client:
        model = client.models.list().data[0].id
    # "openai/" in front of a model's name tells LiteLLM which API the server speaks.
    server = {"model": "openai/" + model, "api_base": base_url, "api_key": api_key}
    print("whole:", repr(converse(server, stream=False)))
    print("streamed:", repr(converse(server, stream=True)))


if __name__ == "__main__":
    main()
