"""A native build against its numpy twin on this machine: a few small problems of awkward sizes, half a second.

    python -m engine.kernels.selftest            which builds are installed, and which of them this CPU can execute
    python -m engine.kernels.selftest avx2       that build's checks

Both write one JSON value and exit with status 0. A build that is damaged or wrong for this CPU may end the process that
imports it with SIGILL or SIGSEGV: whoever wants to know and to live runs this in a process of its own.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import msgspec
import numpy as np

from engine.config import BLOCK_SIZE, ISAS
from engine.kernels.batch import (
    EncoderProgram,
    Float32,
    Int32,
    LogprobArrays,
    Program,
    SamplingArrays,
    StepBatch,
    TextBatch,
    Weights,
)
from engine.kernels.layout import GROUP, Correction, PackedTensor, pack_bf16, pack_matrix, to_bf16
from engine.kernels.native import NativeProgram, build, native_logprobs, native_matrix, native_sampling
from engine.kernels.native_encoder import NativeEncoder
from engine.kernels.reference import ReferenceProgram, kernel_matrix
from engine.kernels.reference_encoder import ReferenceEncoder
from engine.kernels.reference_sampler import sample, uniform, write_logprobs
from engine.models.spec import DecoderSpec, EncoderSpec, RopeSpec
from engine.ranks import Ranks

UNFUSED = frozenset({"portable"})
"""Builds without fused multiply-adds: they round once more than the twin, whose bits all others give."""

FORMATS = {
    "4-bit, zero point": (4, Correction.ZERO_POINT),
    "4-bit, minimum": (4, Correction.MIN),
    "8-bit, zero point": (8, Correction.ZERO_POINT),
    "8-bit, minimum": (8, Correction.MIN),
    "bfloat16": (16, Correction.NONE),
}
SHAPES = ((1, 32), (33, 64), (65, 160))  # outputs, inputs: no multiple of a strip, of a half, of a vector
NUM_ROWS = (1, 3, 8)

SPEC = DecoderSpec(
    family="self-test",
    num_layers=2,
    hidden_size=96,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=160,
    vocab_size=301,
    max_position=128,
    norm_eps=1e-5,
    rope=RopeSpec(theta=10000.0, dim=16),
)
ENCODER = EncoderSpec(
    family="self-test",
    num_layers=2,
    hidden_size=96,
    num_heads=6,
    intermediate_size=160,
    vocab_size=301,
    max_position=64,
    norm_eps=1e-12,
    normalize=True,
)
TEXTS = (1, 33, 45)  # tokens of each
PROMPT = 45  # tokens: over one KV block, and not a whole number of them
CHUNK = 31

ONE, TWO = Ranks.single(1), Ranks.single(2)
UNEVEN = Ranks(threads=(1, 2), cpus=((), ()), copy_weights=True)


class BuildState(msgspec.Struct, frozen=True):
    """One build, as the survey finds it."""

    isa: str
    installed: bool
    executable: bool  # the CPU has its instructions


class Check(msgspec.Struct, frozen=True):
    """One check of a build. `error` says what was expected and what came; empty where they agree."""

    name: str
    error: str = ""


def survey() -> list[BuildState]:
    """The native builds, best first. Imports the portable one, which is asked what the CPU can do."""
    portable = build("portable")
    return [
        BuildState(
            isa,
            installed=importlib.util.find_spec(f"engine.kernels._{isa}") is not None,
            executable=portable is not None and bool(portable.cpu_supports(isa)),
        )
        for isa in ISAS
        if isa != "reference"
    ]


def self_test(
    isa: str, *, module: ModuleType | None = None, create: Callable[..., Program] = NativeProgram
) -> list[Check]:
    """Check the build of `isa`; `module` and `create` stand in for its extension module and its Program."""
    module = module or build(isa)
    if module is None:
        return [Check("import", f"the {isa} kernels are not installed")]
    return [
        _checked("random numbers", _generator, module),
        *(_checked(f"products, {name}", _products, isa, module, *fmt) for name, fmt in FORMATS.items()),
        *(_checked(f"decoder, {name}", _decoder, isa, create, *fmt) for name, fmt in FORMATS.items()),
        *(_checked(f"encoder, {name}", _encoder, isa, *FORMATS[name]) for name in ("8-bit, minimum", "bfloat16")),
        _checked("sampler", _sampler, module),
        _checked("log-probabilities", _logprobs, isa, module),
    ]


def _checked(name: str, check: Callable[..., None], *arguments: Any) -> Check:
    try:
        check(*arguments)
    except Exception as error:  # whatever a broken build raises is its finding
        return Check(name, f"{type(error).__name__}: {error}" if not isinstance(error, AssertionError) else str(error))
    return Check(name)


def _generator(module: ModuleType) -> None:
    for seed, choice, position in ((0, 0, 0), (1, 2, 3), (2**64 - 1, 2**31 - 1, 2**31 - 1)):
        expected, got = uniform(seed, choice, position), module.uniform(seed, choice, position)
        _need(expected == got, f"draw {(seed, choice, position)}: expected {expected}, got {got}")


def _products(isa: str, module: ModuleType, bits: int, correction: Correction) -> None:
    for n, k in SHAPES:
        rng = np.random.default_rng((n, k, bits))
        tensor = random_tensor(rng, n, k, bits, correction)
        x = rng.normal(size=(11, k)).astype(np.float32)
        expected = kernel_matrix(tensor).project(x)
        for rows in NUM_ROWS:
            got = np.full((len(x), n), np.nan, np.float32)
            module.matmul(native_matrix(tensor), x, rows, got)
            _need_equal(isa, f"{n} outputs of {k} inputs, {rows} rows at once", expected, got, tolerance=1e-5)


def _decoder(isa: str, create: Callable[..., Program], bits: int, correction: Correction) -> None:
    """Logits of a prompt, whole and in chunks, and greedy tokens after it: attention, norms, rope, KV blocks."""
    weights = random_weights(SPEC, bits, correction)
    tokens = np.random.default_rng(bits).integers(0, SPEC.vocab_size, PROMPT).astype(np.int32)
    expected = _logits(ReferenceProgram(SPEC, weights, num_blocks=4), tokens, PROMPT)
    # Rounding once more moves an activation to the next of its levels here and there.
    tolerance = 2e-2
    first: Float32 | None = None
    for ranks, chunk in ((ONE, PROMPT), (TWO, CHUNK), (UNEVEN, CHUNK)):
        program = create(SPEC, weights, num_blocks=4, ranks=ranks, isa=isa)
        try:
            got = _logits(program, tokens, chunk)
        finally:
            program.close()
        how = f"{ranks.num_threads} threads in {len(ranks)} ranks, {chunk} tokens a step"
        _need_equal(isa, f"logits, {how}", expected, got, tolerance=tolerance)
        first = got if first is None else first
        _need(bool((got == first).all()), f"{how}: other bits than 1 thread gives")


def _encoder(isa: str, bits: int, correction: Correction) -> None:
    """Embeddings of a few texts at once: attention over whole texts, norms, GELU, pooling."""
    weights = random_weights(ENCODER, bits, correction)
    tokens = np.random.default_rng(bits).integers(0, ENCODER.vocab_size, sum(TEXTS)).astype(np.int32)
    expected = _vectors(ReferenceEncoder(ENCODER, weights, max_tokens=len(tokens)), tokens)
    for ranks in (ONE, TWO):
        program = NativeEncoder(ENCODER, weights, max_tokens=len(tokens), ranks=ranks, isa=isa)
        try:
            got = _vectors(program, tokens)
        finally:
            program.close()
        _need_equal(isa, f"embeddings, {ranks.num_threads} threads", expected, got, tolerance=2e-2)


def _vectors(program: EncoderProgram, tokens: Int32) -> Float32:
    """Embeddings [texts, hidden] of TEXTS, a layer at a time."""
    starts = np.cumsum([0, *TEXTS]).astype(np.int32)
    out = np.full((len(TEXTS), ENCODER.output_size), np.nan, np.float32)
    program.begin(TextBatch(tokens, tokens % ENCODER.num_types, starts, out))
    while not program.run(1):
        pass
    return out


def _sampler(module: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for vocab in (1, 17, 1000):
        logits = (np.round(rng.normal(size=(12, vocab)) * 12) / 4).astype(np.float32)  # with ties
        for temperature, top_k, top_p, min_p in ((0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.7, 5, 0.9, 0.05)):
            how = sampling_arrays(len(logits), vocab, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            got = np.empty(len(logits), np.int32)
            module.sample(logits, native_sampling(module, how), got)
            expected = sample(logits, how)
            _need(
                bool((got == expected).all()),
                f"temperature {temperature}, top_k {top_k}, top_p {top_p}, min_p {min_p}, {vocab} tokens: expected "
                f"{expected.tolist()}, got {got.tolist()}",
            )


def _logprobs(isa: str, module: ModuleType) -> None:
    rng = np.random.default_rng(1)
    for vocab in (1, 17, 1000, 1061):
        logits = (np.round(rng.normal(size=(6, vocab)) * 12) / 4).astype(np.float32)  # with ties
        targets = rng.integers(0, vocab, len(logits)).astype(np.int32)
        expected, got = (logprob_arrays(targets, 20) for _ in range(2))
        write_logprobs(logits, targets, expected)
        module.logprobs(logits, native_logprobs(module, got))
        same = bool((got.tokens == expected.tokens).all() and (got.ranks == expected.ranks).all())
        _need(same, f"{vocab} tokens: expected {expected.tokens.tolist()}, got {got.tokens.tolist()}")
        there = expected.tokens >= 0
        _need_equal(isa, f"{vocab} tokens", expected.logprobs[there], got.logprobs[there], tolerance=1e-5)


def logprob_arrays(targets: Int32, most: int) -> LogprobArrays:
    """Rows that want the `most` best tokens beside their targets."""
    shape = (len(targets), 1 + most)
    return LogprobArrays(
        counts=np.full(len(targets), most, np.int32),
        targets=targets,
        tokens=np.zeros(shape, np.int32),
        logprobs=np.zeros(shape, np.float32),
        ranks=np.zeros(len(targets), np.int32),
    )


def _logits(program: Program, tokens: Int32, chunk: int) -> Float32:
    """Logits [tokens, vocab] of one sequence in the program's blocks, `chunk` tokens a step."""
    parts = []
    for start in range(0, len(tokens), chunk):
        piece = tokens[start : start + chunk]
        batch = StepBatch(
            token_ids=piece,
            positions=np.arange(start, start + len(piece), dtype=np.int32),
            query_starts=np.array([0, len(piece)], np.int32),
            seq_lens=np.array([start + len(piece)], np.int32),
            block_tables=np.arange(-(-len(tokens) // BLOCK_SIZE), dtype=np.int32)[::-1].copy()[None, None],
            logits_rows=np.arange(len(piece), dtype=np.int32),
            logits=np.full((len(piece), SPEC.vocab_size), np.nan, np.float32),
        )
        program.step(batch)
        assert batch.logits is not None
        parts.append(batch.logits)
    return np.concatenate(parts)


def random_tensor(rng: np.random.Generator, n: int, k: int, bits: int, correction: Correction) -> PackedTensor:
    """A random packed matrix [n, k] whose outputs keep the size of its inputs."""
    if correction is Correction.NONE:
        return PackedTensor(*pack_bf16(to_bf16((rng.normal(size=(n, k)) / np.sqrt(k)).astype(np.float32))))
    levels = 1 << bits
    quants = rng.integers(0, levels, (n, k), dtype=np.uint8)
    scales = (rng.uniform(0.5, 1.5, (n, k // GROUP)) * np.sqrt(12 / k) / levels).astype(np.float16)
    mins = (-scales * np.float16(levels / 2)).astype(np.float16) if correction is Correction.MIN else None
    return PackedTensor(*pack_matrix(quants, scales, mins, bits=bits))


def random_weights(spec: DecoderSpec | EncoderSpec, bits: int, correction: Correction) -> Weights:
    """Random weights of a spec, all matrices in one format."""
    rng = np.random.default_rng(bits)
    return {
        name: PackedTensor(None, rng.uniform(0.5, 1.5, shape).astype(np.float32))
        if len(shape) == 1
        else random_tensor(rng, shape[0], shape[1], bits, correction)
        for name, shape in spec.tensor_shapes().items()
    }


def sampling_arrays(
    rows: int, vocab: int, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> SamplingArrays:
    """Rows that sample alike, each with a history that is penalized and a biased token."""

    def each(value: float) -> Float32:
        return np.full(rows, value, np.float32)

    starts = np.arange(rows + 1, dtype=np.int32)
    return SamplingArrays(
        temperature=each(temperature),
        top_k=np.full(rows, top_k, np.int32),
        top_p=each(top_p),
        min_p=each(min_p),
        repetition_penalty=each(1.3),
        presence_penalty=each(0.5),
        frequency_penalty=each(0.25),
        seed=np.arange(rows, dtype=np.uint64) + np.uint64(2**40),
        choice=np.zeros(rows, np.int32),
        position=starts[:-1] * 7,
        history_starts=starts * 3,
        history_output_starts=starts[:-1] * 3 + 1,
        history_tokens=(np.arange(3 * rows, dtype=np.int32) * 5) % vocab,
        bias_starts=starts,
        bias_tokens=starts[:-1] % vocab,
        bias_values=each(-1.5),
    )


def _need_equal(isa: str, what: str, expected: Float32, got: Float32, *, tolerance: float) -> None:
    """The twin's bits; from an unfused build values as close as `tolerance` times the largest one."""
    room = np.float32(tolerance) * np.abs(expected).max() if isa in UNFUSED else np.float32(0)
    wrong = ~(np.abs(got - expected) <= room)  # written so that NaN is wrong
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.size} values differ, the first at {list(at)}: expected "
            f"{expected[at]!r}, got {got[at]!r}"
        )


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise AssertionError(message)


def main(arguments: list[str]) -> None:
    faulthandler.enable()
    answer: list[BuildState] | list[Check] = self_test(arguments[0]) if arguments else survey()
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
