"""The OpenAI SDK with a Seraph server: an answer as an object of a class, which the server keeps to by a JSON schema.

SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... python clients/examples/openai_parse.py
"""

from __future__ import annotations

import os
from typing import Literal

from openai import OpenAI
from pydantic import BaseModel


class Verdict(BaseModel):
    claim: Literal["true", "false", "unknown"]
    certain: bool


def main() -> None:
    base_url = os.environ.get("SERAPH_BASE_URL", "http://127.0.0.1:8000")
    with OpenAI(base_url=f"{base_url}/v1", api_key=os.environ.get("SERAPH_API_KEY", "none")) as client:
        answer = client.chat.completions.parse(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": "Paris is the capital of France."}],
            response_format=Verdict,
            temperature=0,
            max_tokens=400,
        )
    verdict = answer.choices[0].message.parsed
    assert verdict is not None
    print(verdict.model_dump_json())


if __name__ == "__main__":
    main()
