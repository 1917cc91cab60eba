"""The OpenAI SDK with a Seraph server: one answer, then the same one streamed.

SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... python clients/examples/openai_python.py
"""

from __future__ import annotations

import os

from openai import OpenAI
from openai.types.chat import ChatCompletionUserMessageParam


def main() -> None:
    base_url = os.environ.get("SERAPH_BASE_URL", "http://127.0.0.1:8000")
    client = OpenAI(base_url=f"{base_url}/v1", api_key=os.environ.get("SERAPH_API_KEY", "none"))
    model = client.models.list().data[0].id
    question: ChatCompletionUserMessageParam = {"role": "user", "content": "Tell me the capital of France."}

    answer = client.chat.completions.create(model=model, messages=[question], temperature=0, max_tokens=20)
    print(answer.choices[0].message.content)

    stream = client.chat.completions.create(model=model, messages=[question], temperature=0, max_tokens=20, stream=True)
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
    client.close()


if __name__ == "__main__":
    main()
