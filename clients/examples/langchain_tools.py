"""LangChain with a Seraph server: a tool that the model calls, is told the result of, and answers by.

Once whole, then streamed.

SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... python clients/examples/langchain_tools.py
"""

from __future__ import annotations

import json
import os
from functools import reduce
from operator import add
from typing import Any, Literal

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import SecretStr

RETURNED = {"Paris": "18 degrees, cloudy", "Oslo": "3 degrees, snow", "Lima": "25 degrees, sunny"}


def weather(city: Literal["Paris", "Oslo", "Lima"]) -> str:
    """Tell the weather of a city."""
    return RETURNED[city]


def whole(chat: Any, messages: list[Any]) -> Any:
    """The model's next message."""
    return chat.invoke(messages)


def streamed(chat: Any, messages: list[Any]) -> Any:
    """The same: chunks add up to it, those of its calls too."""
    return reduce(add, chat.stream(messages))


def converse(chat: Any, ask: Any) -> str:
    """Have the model call the tool, and answer by what that returned."""
    tools = [tool(weather)]
    bound = {
        choice: chat.bind_tools(tools, tool_choice=choice, strict=True, parallel_tool_calls=False)
        for choice in ("required", "none")
    }
    messages: list[Any] = [HumanMessage("What is the weather in Oslo?")]
    message = ask(bound["required"], messages)
    messages.append(message)
    for call in message.tool_calls:
        print("called:", call["name"], json.dumps(call["args"]))
        result = tools[0].invoke(call)  # a ToolMessage, which has the call's id
        print("returned:", result.content)
        messages.append(result)
    return str(ask(bound["none"], messages).content)


def main() -> None:
    base_url = os.environ.get("SERAPH_BASE_URL", "http://127.0.0.1:8000") + "/v1"
    api_key = SecretStr(os.environ.get("SERAPH_API_KEY", "none"))
    with OpenAI(base_url=base_url, api_key=api_key.get_secret_value()) as client:
        model = client.models.list().data[0].id
    chat = ChatOpenAI(model=model, base_url=base_url, api_key=api_key, temperature=0, max_tokens=200)
    print("whole:", repr(converse(chat, whole)))
    print("streamed:", repr(converse(chat, streamed)))


if __name__ == "__main__":
    main()
