"""LiteLLM with a Seraph server: one answer, the same one streamed, and vectors.

SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... python clients/examples/litellm_python.py
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its table of prices from the package, not the network

import litellm
from openai import OpenAI


def main() -> None:
    # "openai/" in front of a model's name tells LiteLLM which API the server speaks.
    server: dict[str, Any] = {
        "api_base": os.environ.get("SERAPH_BASE_URL", "http://127.0.0.1:8000") + "/v1",
        "api_key": os.environ.get("SERAPH_API_KEY", "none"),
    }
    with OpenAI(base_url=server["api_base"], api_key=server["api_key"]) as client:
        models = {model.to_dict()["kind"]: model.id for model in reversed(client.models.list().data)}
    question = [{"role": "user", "content": "Tell me the capital of France."}]
    asked: dict[str, Any] = {"messages": question, "temperature": 0, "max_tokens": 20, **server}

    answer = litellm.completion(model="openai/" + models["generate"], **asked)
    print("whole:", repr(answer.choices[0].message.content))
    stream = litellm.completion(model="openai/" + models["generate"], stream=True, **asked)
    print("streamed:", repr("".join(chunk.choices[0].delta.content or "" for chunk in stream)))

    if "embed" not in models:
        print("no embedding model is served: start one with --embedding-model")
        return
    texts = ["Rivers carry water to the sea.", "Bread is baked from flour."]
    vectors = litellm.embedding(model="openai/" + models["embed"], input=texts, encoding_format="float", **server)
    print("vectors:", [len(each["embedding"]) for each in vectors.data])


if __name__ == "__main__":
    main()
