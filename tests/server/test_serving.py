"""What a start says."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.request import Capabilities, EncoderInfo, WeightsInfo
from server.kinds import Kind
from server.serving import Table, banner
from tests.server.support import settings

KNOWN = Capabilities(
    engine="native",
    model="m",
    max_model_len=8192,
    vocab_size=100,
    isa="avx2",
    threads=2,
    max_position=8192,
    checkpoint_format="Q4_1 GGUF",
    num_parameters=134_515_008,
    weights=WeightsInfo(nbytes=96_600_000, bits=4),
    num_kv_blocks=512,
    kv_cache_tokens=16384,
    kv_cache_bytes=377_487_360,
)


def rows(known: Capabilities = KNOWN, defaults: dict[str, float] | None = None, **changes: Any) -> dict[str, str]:
    configured = settings(**changes)
    text = banner(configured, [Table(configured.model_names[0], known, defaults or {})], 9000)
    return {line[2:12].strip(): line[13:] for line in text.partition("Try it")[0].splitlines() if line.startswith("  ")}


def test_the_table() -> None:
    assert rows(served_model_name=("a", "b"), defaults={"temperature": 0.2, "top_k": 50}) == {
        "model": "a, b",
        "weights": "Q4_1 GGUF, packed 4-bit: 135 million parameters in 97 MB",
        "kernels": "avx2, 2 threads",
        "context": "8192 tokens",
        "KV cache": "16384 tokens in 512 blocks, 377 MB: 2 requests of full length",
        "sampling": "temperature 0.2, top_k 50",
        "door": "loopback only",
        "listening": "http://127.0.0.1:9000",
    }


def test_how_tools_are_called() -> None:
    text = banner(settings(), [Table(("m",), KNOWN, {}, tools="hermes")], 9000)
    assert "  tools      hermes\n" in text


@pytest.mark.parametrize(
    ("changes", "row", "said"),
    [
        ({"max_model_len": 4096}, "context", "4096 tokens (of the model's 8192)"),
        ({"max_model_len": 16384}, "KV cache", "16384 tokens in 512 blocks, 377 MB: 1 request of full length"),
        ({"max_model_len": 10000}, "KV cache", "16384 tokens in 512 blocks, 377 MB: 1.6 requests of full length"),
        ({"threads": 1}, "kernels", "avx2, 1 thread"),
        ({"num_ranks": 1}, "kernels", "avx2, 2 threads"),
        ({"num_ranks": 2}, "kernels", "avx2, 2 ranks of 1 thread"),
        ({"threads": 8, "num_ranks": 2}, "kernels", "avx2, 2 ranks of 4 threads"),
        ({"threads": 3, "num_ranks": 2}, "kernels", "avx2, 3 threads in 2 ranks"),
        (
            {"weights": WeightsInfo(nbytes=14_500_000_000, bits=16), "num_parameters": 7_241_732_096},
            "weights",
            "Q4_1 GGUF, bfloat16: 7.2 billion parameters in 14.5 GB",
        ),
    ],
)
def test_a_row(changes: dict[str, Any], row: str, said: str) -> None:
    assert rows(msgspec.structs.replace(KNOWN, **changes))[row] == said


def test_what_to_try_is_what_the_model_can_do() -> None:
    chat, text = (
        banner(settings(), [Table(("m",), KNOWN, {}, chats)], 9000).partition("Try it")[2] for chats in (True, False)
    )
    assert "http://127.0.0.1:9000/v1/chat/completions " in chat
    assert "messages" in chat
    assert "http://127.0.0.1:9000/v1/completions " in text
    assert '"prompt": ' in text


def test_the_door_is_told() -> None:
    assert rows(api_key=("k",), host="0.0.0.0")["door"] == "key"
    assert rows(insecure=True, host="::1")["listening"] == "http://[::1]:9000"
    assert rows(insecure=True, host="0.0.0.0")["door"] == "open to everyone"


def test_several_models_have_a_block_each() -> None:
    other = msgspec.structs.replace(KNOWN, max_model_len=4096)
    text = banner(settings(admin_key=("a",)), [Table(("m",), KNOWN, {}), Table(("n",), other, {"top_k": 5})], 9000)
    _, first, second, _ = text.partition("Try it")[0].split("\n\n")
    assert first.splitlines()[0] == "  model      m" and "listening" not in first
    assert second.splitlines()[0] == "  model      n" and "4 requests of full length" in second
    assert second.splitlines()[-2:] == [
        "  admin      /admin/models, by its key",
        "  listening  http://127.0.0.1:9000",
    ]
    assert '"model": "m"' in text


def test_an_encoder_s_block_says_what_it_makes() -> None:
    encoder = EncoderInfo(model="e", output_size=384, max_input_len=256, vocab_size=100)
    known = msgspec.structs.replace(KNOWN, max_model_len=256, max_position=256, encoder=encoder)
    alone = banner(settings(), [Table(("e",), known, {}, False, Kind.EMBED)], 9000)
    assert "  kernels    avx2, 2 threads\n  context    256 tokens\n  embeds     384 dimensions\n" in alone
    assert "KV cache" not in alone and "/v1/embeddings " in alone
    guest = banner(settings(), [Table(("m",), KNOWN, {}), Table(("e",), known, {}, False, Kind.EMBED, "m")], 9000)
    assert "  kernels    in the gaps of m\n" in guest and "/v1/chat/completions " in guest
    scorer = msgspec.structs.replace(known, encoder=msgspec.structs.replace(encoder, output_size=1, num_labels=1))
    scores = banner(settings(), [Table(("e",), scorer, {}, False, Kind.SCORE)], 9000)
    assert "  scores     1 label\n" in scores and "/v1/rerank " in scores


def test_an_engine_that_says_little_leaves_rows_out() -> None:
    assert set(rows(Capabilities(engine="x", model="m", max_model_len=10, vocab_size=9, kv_cache_tokens=20))) == {
        "model",
        "context",
        "KV cache",
        "door",
        "listening",
    }
