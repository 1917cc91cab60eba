"""The kernels: one Program per instruction set, chosen at run time from the builds that this CPU can execute."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import ISAS, requested_isa
from engine.errors import ConfigError
from engine.kernels.batch import EncoderProgram, Program, Weights
from engine.kernels.native import NativeProgram, build
from engine.models.spec import DecoderSpec, EncoderSpec
from engine.ranks import Ranks

__all__ = ["available_isas", "create_encoder", "create_program", "select_isa"]


def available_isas() -> tuple[str, ...]:
    """The native builds that are installed and that this CPU can execute, best first."""
    return tuple(isa for isa in ISAS if isa != "reference" and _executable(isa))


def select_isa(isa: str = "auto", *, available: Sequence[str] | None = None) -> str:
    """The build to use: `isa`, or SERAPH_ISA where it is "auto", or the best of those `available` (None: found out).

    Raises ConfigError for a build that is unknown, not installed or not executable here.
    """
    wanted = requested_isa() if isa == "auto" else isa
    available = available_isas() if available is None else available
    if wanted == "auto":
        if not available:
            raise ConfigError("isa: no native kernels are installed; `make build` compiles them.")
        return available[0]
    if wanted != "reference" and wanted not in available:
        raise ConfigError(f"isa must be auto or one of {', '.join((*available, 'reference'))} here, got {wanted!r}.")
    return wanted


def create_program(
    spec: DecoderSpec,
    weights: Weights,
    *,
    num_blocks: int,
    threads: int = 1,
    ranks: Ranks | None = None,
    isa: str = "auto",
    kv_dtype: str = "bf16",
) -> Program:
    """Compile `spec` and its packed weights for `isa`, with KV memory of `num_blocks` blocks of `kv_dtype`.

    `ranks` says more than `threads`, and stands in its place; the reference has neither, and the same bits. The weights
    are used where they lie and must stay there until `close`. Raises ValueError for weights that do not fit the spec,
    ConfigError as `select_isa`.
    """
    chosen = select_isa(isa)
    if chosen == "reference":
        from engine.kernels.reference import ReferenceProgram  # numpy at length: only where asked for

        return ReferenceProgram(spec, weights, num_blocks=num_blocks, kv_dtype=kv_dtype)
    return NativeProgram(
        spec, weights, num_blocks=num_blocks, threads=threads, ranks=ranks, isa=chosen, kv_dtype=kv_dtype
    )


def create_encoder(
    spec: EncoderSpec,
    weights: Weights,
    *,
    max_tokens: int,
    threads: int = 1,
    ranks: Ranks | None = None,
    isa: str = "auto",
    beside: Program | None = None,
) -> EncoderProgram:
    """Compile `spec` and its packed weights for `isa`, for batches of up to `max_tokens` tokens.

    It runs on the threads of the program `beside`, of the same build, between its steps; without one, on `threads` or
    `ranks` of its own. The weights are used where they lie and must stay there until `close`. Raises as
    `create_program`.
    """
    chosen = select_isa(isa)
    if chosen == "reference":
        from engine.kernels.reference_encoder import ReferenceEncoder  # numpy at length: only where asked for

        return ReferenceEncoder(spec, weights, max_tokens=max_tokens)
    from engine.kernels.native_encoder import NativeEncoder  # most engines have no encoder

    return NativeEncoder(
        spec,
        weights,
        max_tokens=max_tokens,
        ranks=Ranks.single(threads) if ranks is None else ranks,
        isa=chosen,
        beside=beside if isinstance(beside, NativeProgram) else None,
    )


def _executable(isa: str) -> bool:
    """The portable build is the one that every CPU can import, so it is the one that is asked about the others."""
    portable = build("portable")
    return portable is not None and bool(portable.cpu_supports(isa)) and build(isa) is not None
