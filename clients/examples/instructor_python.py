"""Instructor with a Seraph server: an answer as an object of a class, to whose JSON schema the server keeps it.

Once as the answer's form, then as the arguments of a tool that must be called.

SERAPH_BASE_URL=http://127.0.0.1:8000 SERAPH_API_KEY=... python clients/examples/instructor_python.py
"""

from __future__ import annotations

import os
from typing import Any, Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict


class Verdict(BaseModel):
    """What is said of a claim, and nothing besides: without that an answer may go on with fields of its own."""

    model_config = ConfigDict(extra="forbid")

    claim: Literal["true", "false", "unknown"]
    certain: bool


# A tool that may be called several times would make several objects.
MODES: dict[Any, dict[str, Any]] = {
    instructor.Mode.JSON_SCHEMA: {},
    instructor.Mode.TOOLS: {"parallel_tool_calls": False},
}


def main() -> None:
    base_url = os.environ.get("SERAPH_BASE_URL", "http://127.0.0.1:8000")
    with OpenAI(base_url=f"{base_url}/v1", api_key=os.environ.get("SERAPH_API_KEY", "none")) as plain:
        model = plain.models.list().data[0].id
        for mode, options in MODES.items():
            client = instructor.from_openai(plain, mode=mode)
            verdict = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": "Paris is the capital of France."}],
                response_model=Verdict,
                temperature=0,
                max_tokens=400,
                **options,
            )
            print(verdict.model_dump_json())


if __name__ == "__main__":
    main()
