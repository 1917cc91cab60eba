from __future__ import annotations

from typing import Any

import pytest

from tests.server.fakes import BOS, FakeEngine
from tests.server.support import Client, client_for, settings

HI = {"role": "user", "content": "Hi"}
HI_TOKENS = [ord("H"), ord("i")]


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "Hi"}, [BOS, *HI_TOKENS]),
        ({"prompt": "Hi", "add_special_tokens": False, "model": "m"}, HI_TOKENS),
        ({"prompt": "", "add_special_tokens": False}, []),
        ({"messages": [HI]}, [BOS, *HI_TOKENS]),
        ({"messages": [HI], "add_special_tokens": False, "add_generation_prompt": True}, [BOS, *HI_TOKENS]),
    ],
)
async def test_tokenize(client: Client, body: dict[str, Any], tokens: list[int]) -> None:
    answer = (await client.post("/tokenize", json=body)).json()
    assert (answer["tokens"], answer["count"], answer["token_strs"]) == (tokens, len(tokens), None)


async def test_detokenize_writes_special_tokens_too(client: Client) -> None:
    answer = (await client.post("/detokenize", json={"tokens": [BOS, *HI_TOKENS]})).json()
    assert answer == {"prompt": "\x01Hi"}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "Hi", "messages": [HI]}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [HI], "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"messages": [{**HI, "tool_calls": [{}]}]}, 400, "messages.0.tool_calls.0.function"),
        ("/tokenize", {"prompt": "Hi", "return_token_strs": 1}, 400, "return_token_strs"),
        ("/tokenize", {"prompt": "Hi", "continue_final_message": True}, 400, "continue_final_message"),
        ("/tokenize", {"prompt": "Hi", "chat_template_kwargs": {"a": 1}}, 400, "chat_template_kwargs"),
        ("/tokenize", {"prompt": "Hi", "model": "other"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, "2"]}, 400, "tokens.1"),
        ("/detokenize", {"tokens": [1, 128]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
    ],
)
async def test_bad_input(client: Client, path: str, body: dict[str, Any], status: int, param: str) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param


async def test_unknown_names_are_reported(client: Client) -> None:
    response = await client.post("/tokenize", json={"prompt": "Hi", "frobnicate": 1})
    assert response.headers["x-seraph-ignored"] == "frobnicate"


async def test_it_needs_the_key() -> None:
    async with client_for(FakeEngine(), settings(api_key=("k",))) as client:
        assert (await client.post("/tokenize", json={"prompt": "Hi"})).status_code == 401
        assert (await client.post("/detokenize", json={"tokens": [1]})).status_code == 401
