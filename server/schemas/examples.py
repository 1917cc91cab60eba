"""One example of every body and answer, for the OpenAPI document. Tests hold them to what the server sends."""

from __future__ import annotations

from typing import Any

_MODEL = "smollm2-135m-instruct"
_CREATED = 1_767_225_600
_FINGERPRINT = "fp_44709d6fcb2a"
_USAGE = {
    "prompt_tokens": 14,
    "completion_tokens": 8,
    "total_tokens": 22,
    "prompt_tokens_details": {"cached_tokens": 0},
}
_TEXTS_USAGE = {"prompt_tokens": 12, "total_tokens": 12}

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": _MODEL,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        "max_tokens": 64,
        "temperature": 0.7,
        "seed": 7,
    },
    "/v1/completions": {
        "model": _MODEL,
        "prompt": "The capital of France is",
        "max_tokens": 16,
        "temperature": 0,
        "stop": ["\n"],
    },
    "/v1/embeddings": {"model": "all-minilm-l6-v2", "input": ["a river", "a mountain"], "dimensions": 2},
    "/v1/score": {"model": "cross", "text_1": "what flows?", "text_2": ["a river", "a mountain"]},
    "/v1/rerank": {"model": "cross", "query": "what flows?", "documents": ["a mountain", "a river"], "top_n": 1},
    "/tokenize": {"model": _MODEL, "prompt": "a river", "return_token_strs": True},
    "/detokenize": {"model": _MODEL, "tokens": [81, 14213]},
    "/admin/models": {"model": "smollm2-135m-instruct", "name": "small", "kv_cache_memory": "512MiB"},
}
"""By path."""

_SERVED = {
    "id": _MODEL,
    "object": "model",
    "created": _CREATED,
    "owned_by": "seraph",
    "root": _MODEL,
    "parent": None,
    "max_model_len": 8192,
    "generation_defaults": {"temperature": 0.2, "top_p": 0.9},
    "kind": "generate",
    "state": "ready",
    "tool_format": "generic",
    "reasoning": False,
}
_LOADED = {
    "object": "model",
    "name": "small",
    "names": ["small"],
    "source": _MODEL,
    "kind": "generate",
    "state": "ready",
    "reason": None,
    "progress": None,
    "host": None,
    "pid": 4711,
    "weights_bytes": 92_000_000,
    "kv_cache_bytes": 536_870_912,
    "kv_cache_tokens": 23_296,
    "max_model_len": 8192,
}
_LOADING = {
    **_LOADED,
    "kind": None,
    "state": "fetching",
    "progress": {"label": "model.gguf", "done_bytes": 1_048_576, "total_bytes": 92_000_000},
    "pid": None,
    "kv_cache_tokens": 0,
    "max_model_len": None,
}
_HEALTH = {"status": "ready"}

ANSWERS: dict[tuple[str, str], Any] = {
    ("post", "/v1/chat/completions"): {
        "id": "chatcmpl-6f0f4f7f7c5b4a42a2e7d4f0ddc5a1b0",
        "object": "chat.completion",
        "created": _CREATED,
        "model": _MODEL,
        "system_fingerprint": _FINGERPRINT,
        "service_tier": "default",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "The capital of France is Paris.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": _USAGE,
    },
    ("post", "/v1/completions"): {
        "id": "cmpl-0d9c4cf4c8f64c4f9e0b8f3d3f4f7a11",
        "object": "text_completion",
        "created": _CREATED,
        "model": _MODEL,
        "system_fingerprint": _FINGERPRINT,
        "choices": [{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "stop"}],
        "usage": _USAGE,
    },
    ("post", "/v1/embeddings"): {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.6, 0.8]},
            {"object": "embedding", "index": 1, "embedding": [-0.8, 0.6]},
        ],
        "model": "all-minilm-l6-v2",
        "usage": _TEXTS_USAGE,
    },
    ("post", "/v1/score"): {
        "id": "score-1f3870be274f6c49b3e31a0c6728957f",
        "object": "list",
        "created": _CREATED,
        "model": "cross",
        "data": [
            {"index": 0, "object": "score", "score": 0.97},
            {"index": 1, "object": "score", "score": 0.02},
        ],
        "usage": _TEXTS_USAGE,
    },
    ("post", "/v1/rerank"): {
        "id": "rerank-1f3870be274f6c49b3e31a0c6728957f",
        "model": "cross",
        "usage": _TEXTS_USAGE,
        "results": [{"index": 1, "document": {"text": "a river"}, "relevance_score": 0.97}],
    },
    ("post", "/tokenize"): {
        "count": 2,
        "max_model_len": 8192,
        "tokens": [81, 14213],
        "token_strs": ["a", "Ġriver"],
    },
    ("post", "/detokenize"): {"prompt": "a river"},
    ("get", "/v1/models"): {"object": "list", "data": [_SERVED]},
    ("get", "/v1/models/{id}"): _SERVED,
    ("get", "/admin/models"): {
        "object": "list",
        "data": [_LOADED],
        "memory": {"limit_bytes": 8 << 30, "promised_bytes": 628_870_912},
    },
    ("post", "/admin/models"): _LOADING,
    ("get", "/admin/models/{name}"): _LOADED,
    ("delete", "/admin/models/{name}"): {**_LOADED, "state": "draining"},
    ("get", "/health"): _HEALTH,
    ("get", "/health/ready"): _HEALTH,
    ("get", "/health/live"): _HEALTH,
    ("get", "/version"): {"version": "0.1.0"},
}
"""By method and path: what stands in the answer's JSON."""

EVENTS = {
    "/v1/chat/completions": {
        "id": "chatcmpl-6f0f4f7f7c5b4a42a2e7d4f0ddc5a1b0",
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": _MODEL,
        "system_fingerprint": _FINGERPRINT,
        "service_tier": "default",
        "choices": [{"index": 0, "delta": {"content": " Paris"}, "logprobs": None, "finish_reason": None}],
    },
    "/v1/completions": {
        "id": "cmpl-0d9c4cf4c8f64c4f9e0b8f3d3f4f7a11",
        "object": "text_completion",
        "created": _CREATED,
        "model": _MODEL,
        "system_fingerprint": _FINGERPRINT,
        "choices": [{"index": 0, "text": " Paris", "logprobs": None, "finish_reason": None}],
    },
}
"""One event of a streamed answer."""

ERROR = {
    "error": {
        "message": "temperature must be between 0 and 2, got 9.0.",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": None,
    }
}
