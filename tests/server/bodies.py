"""Request bodies that are nearly right: valid ones of each endpoint, with values replaced, nested or left out."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

from server.openapi import BODIES
from server.schemas import examples

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
    {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "tool_call_id": "c", "content": "4"},
    {"role": "user", "content": "Hi", "name": "Ann"},
]

MORE: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": MESSAGES, "chat_template_kwargs": {"a": [1, {"b": "c"}]}},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}, "n": 2},
        {"stop": "a", "bad_words": ["ab", "c"], "allowed_token_ids": [72, 73], "logit_bias": {"72": 1.5}},
        {
            "truncate_prompt_tokens": -1,
            "min_tokens": 1,
            "priority": 3,
            "cache_salt": "s",
            "continue_final_message": True,
        },
    ],
    "/v1/completions": [
        {"prompt": [72, 73], "echo": True, "n": 2, "stream": True},
        {"prompt": ["a", "b"], "truncate_prompt_tokens": 2, "include_stop_str_in_output": True},
        {"prompt": [[72], [73]], "skip_special_tokens": False, "ignore_eos": True, "presence_penalty": 1},
    ],
    "/v1/embeddings": [{"input": [[5, 6]], "encoding_format": "base64"}, {"input": "a", "truncate_prompt_tokens": -1}],
    "/v1/score": [{"text_1": ["a", "b"], "text_2": ["c", "d"]}],
    "/v1/rerank": [{"return_documents": False, "priority": 1}],
    "/tokenize": [{"messages": MESSAGES, "add_generation_prompt": False}, {"add_special_tokens": False}],
    "/detokenize": [{"tokens": []}, {"tokens": [0, 306]}],
    "/admin/models": [{"kv_cache_memory": 1 << 20}],
}
"""What is put over an endpoint's example."""

SMALL: dict[str, dict[str, Any]] = {"/detokenize": {"tokens": [72]}, "/v1/embeddings": {"dimensions": 1}}
"""So is this, always: the tests' models are smaller than the example's."""

DEPTHS = (40, 70, 300, 800)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, 127, 128, 2**31, 2**32, 2**63, 2**64, -(2**63) - 1, 10**40),
    *("", "a", "1", "\x00", "\u2581", "\U0001f600", "<|im_end|>", "x" * 3000, "{{ 1 }}", "text", "-1", "NaN"),
    *([], {}, [[]], [None], [0], ["a"], {"a": 1}, {"": ""}, {"type": "text"}, {"role": "user"}, [{"role": "user"}]),
    *(f"nested {depth}" for depth in DEPTHS),
    *({"type": "image_url"}, ["a"] * 200, [1] * 5000, {str(i): i for i in range(2000)}, [[1], ["a"]], [1, "a"]),
)


@st.composite
def bodies(draw: st.DrawFn, path: str) -> bytes:
    """Bytes of a body for `path`, JSON or nearly."""
    more = draw(st.sampled_from([SMALL.get(path, {}), *MORE[path]]))
    body: Any = {**copy.deepcopy(examples.BODIES[path]), **SMALL.get(path, {}), **copy.deepcopy(more)}
    if path == "/tokenize" and "messages" in body:
        del body["prompt"]
    names = st.sampled_from(sorted(BODIES[path].fields))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        parent, key = body, draw(st.sampled_from(sorted(body)) if body else names)
        if draw(st.integers(0, 3)) == 0:
            key = draw(names)
        elif key in parent:
            while isinstance(parent[key], dict | list) and parent[key] and draw(st.booleans()):
                parent = parent[key]
                key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        if draw(st.integers(0, 5)) == 0:
            if isinstance(parent, list) or key in parent:
                del parent[key]
        elif draw(st.integers(0, 8)) == 0:
            parent[key] = draw(st.recursive(st.none() | st.text(max_size=5), lambda one: st.lists(one, max_size=2)))
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    text = json.dumps(body)
    for depth in DEPTHS:  # deeper than Python's own recursion would write
        text = text.replace(f'"nested {depth}"', '{"a":' * depth + "1" + "}" * depth)
    match draw(st.integers(0, 30)):
        case 0:  # cut
            text = text[: draw(st.integers(0, len(text)))]
        case 1:  # a value that Python writes and JSON does not have
            text = text.replace("1", draw(st.sampled_from(["NaN", "Infinity", "01", "1e999", "'1'"])), 1)
        case 2:  # half of a surrogate pair
            text = text.replace("a", "\\ud800", 1)
        case 3:  # a byte that is no UTF-8
            return text.encode().replace(b"e", b"\xff", 1)
        case 4:
            text = "[" * draw(st.sampled_from([10, 900, 100_000])) + text
    return text.encode()
