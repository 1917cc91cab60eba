"""The compiled Program: checked arrays in, one call into C++, chosen tokens out."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from types import ModuleType
from typing import Any

import numpy as np

from engine.config import KV_DTYPES
from engine.errors import StalledRankError
from engine.kernels.batch import Int32, LogprobArrays, SamplingArrays, StepBatch, UInt32, Weights
from engine.kernels.layout import Correction, PackedTensor
from engine.kernels.validate import check_again, check_batch, check_copies, check_weights
from engine.models.spec import DecoderSpec, RopeSpec
from engine.ranks import Ranks

ROPE_PIECE = 1024
"""Positions whose rotation is computed at once, when a sequence first reaches one of them: about a millisecond."""


@functools.cache
def build(isa: str) -> ModuleType | None:
    """The extension module compiled for `isa`, None where it is not installed. Import it only where it can run."""
    try:
        return importlib.import_module(f"engine.kernels._{isa}")
    except ModuleNotFoundError:
        return None


class TeamProgram:
    """What the programs of a native build share: they run on a team of threads, of which one may stall."""

    _module: ModuleType
    _program: Any

    def profile(self, on: bool) -> None:
        """Start, or stop, adding up the seconds that each kind of phase takes; those so far are forgotten."""
        self._program.profile(on)

    def phase_seconds(self) -> dict[str, float]:
        """Seconds of each kind of phase since `profile`, in the order they come in."""
        return dict(self._program.phase_seconds())

    def close(self) -> None:
        """Free the program's memory. Idempotent; it cannot be used afterwards.

        Raises StalledRankError where a thread does not end, unless a call before has said so.
        """
        try:
            self._program.close()
        except self._module.Stalled as error:
            raise self._stalled(error) from None

    def _stalled(self, error: Exception) -> StalledRankError:
        """What a build said of the thread that has stalled; nothing that it may write is freed."""
        told = self._program.stalled()
        if told is None:  # in a step of another program of the same team
            return StalledRankError(f"{error}.")
        rank, thread, phase, seconds = told
        return StalledRankError(f"{error}.", rank=rank, thread=thread, phase=phase, seconds=seconds)


class NativeProgram(TeamProgram):
    """The `Program` of one native build; see `engine.kernels.create_program`. One step at a time."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Weights,
        *,
        num_blocks: int,
        threads: int = 1,
        ranks: Ranks | None = None,
        isa: str,
        kv_dtype: str = "bf16",
    ) -> None:
        check_weights(spec, weights)
        ranks = Ranks.single(threads) if ranks is None else ranks
        if num_blocks < 1 or min(ranks.threads) < 1:
            raise ValueError(f"expected at least 1 block and 1 thread, got {num_blocks} and {min(ranks.threads)}")
        if kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype: expected one of {', '.join(KV_DTYPES)}, got {kv_dtype}")
        module = build(isa)
        if module is None:
            raise ValueError(f"the {isa} kernels are not installed")
        self.spec = spec
        self.num_blocks = num_blocks
        self.threads = ranks.num_threads
        self.num_ranks = len(ranks)
        self.isa = isa
        self._module = module
        self._previous_rows = 0
        self._sampling: SamplingArrays | None = None  # of the last step, and what was made of it
        self._native: Any = None
        self._ropes = [RopeTables(rope, spec.max_position) for rope in spec.ropes()]
        self._program: Any = self._make(
            shape=module.DecoderShape(
                num_layers=spec.num_layers,
                hidden=spec.hidden_size,
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                rope_dim=spec.rope.dim,
                intermediate=spec.intermediate_size,
                vocab=spec.vocab_size,
                norm_eps=spec.norm_eps,
                embedding_scale=spec.embedding_scale,
                attention_scale=spec.query_scale(),
                attention_softcap=spec.attention_softcap,
                final_softcap=spec.final_softcap,
                activation=getattr(module.Activation, spec.activation),
                num_experts=spec.num_experts,
                experts_per_token=spec.experts_per_token,
                normalize_experts=spec.normalize_experts,
            ),
            vectors={name: tensor.data for name, tensor in weights.items() if tensor.format is None},
            matrices={name: native_matrix(tensor) for name, tensor in weights.items() if tensor.format is not None},
            windows=[spec.window(i) for i in range(spec.num_layers)],
            ropes=[(tables.cos, tables.sin) for tables in self._ropes],
            rope_of=[spec.rope_index(i) for i in range(spec.num_layers)],
            num_blocks=num_blocks,
            kv_int8=kv_dtype == "int8",
            layout=team_layout(module, ranks),
            copy_weights=ranks.copy_weights,
        )

    def _make(self, **how: Any) -> Any:
        try:
            return self._module.Program(**how)
        except self._module.Stalled as error:  # while each rank copied its weights
            raise StalledRankError(f"{error}.") from None

    def native(self, isa: str) -> Any:
        """What the build has of it, for another program of the same build to run on its threads."""
        if isa != self.isa:
            raise ValueError(f"expected a program of the {isa} build, got one of {self.isa}")
        return self._program

    def step(self, batch: StepBatch) -> Int32:
        """See `Program.step`."""
        if batch.adapters is not None:  # the build knows of none
            check_batch(self.spec, batch, self.num_blocks, self._previous_rows)
        lens = batch.seq_lens
        if lens.size:
            longest = int(lens.max())
            for tables in self._ropes:
                tables.reach(longest)
        if batch.sampling is not self._sampling:
            self._sampling, self._native = batch.sampling, None
        num_rows = 0 if self._sampling is None else batch.logits_rows.size
        chosen = np.empty(num_rows, np.int32)
        try:
            if self._sampling is not None and self._native is None:
                self._native = native_sampling(self._module, self._sampling)
            computed = self._program.step(
                batch.token_ids,
                batch.positions,
                batch.query_starts,
                lens,
                batch.block_tables,
                batch.logits_rows,
                batch.causal,
                self._native,
                None if batch.logprobs is None else native_logprobs(self._module, batch.logprobs),
                batch.logits,
                batch.hidden,
                chosen,
            )
        except TypeError:  # an array of another type
            computed = False
        except self._module.Stalled as error:
            raise self._stalled(error) from None
        if not computed:  # the build checks what this checks, and this says what it was
            check_batch(self.spec, batch, self.num_blocks, self._previous_rows)
            raise ValueError("the kernels refuse a step that passes their checks in Python")
        self._previous_rows = num_rows
        return chosen

    def choose_again(self, row: int, mask: UInt32) -> int:
        """See `Program.choose_again`."""
        check_again(self._sampling, row, mask, self.spec.vocab_size)
        chosen: int = self._program.choose_again(row, mask)
        return chosen

    def copy_blocks(self, pairs: Int32) -> None:
        """See `Program.copy_blocks`."""
        check_copies(pairs, self.num_blocks)
        try:
            self._program.copy_blocks(pairs)
        except self._module.Stalled as error:
            raise self._stalled(error) from None


def native_sampling(module: ModuleType, how: SamplingArrays) -> Any:
    """Sampling arrays as a build's `step` and `sample` take them."""
    return module.Sampling(*(getattr(how, field.name) for field in dataclasses.fields(SamplingArrays)))


def native_logprobs(module: ModuleType, wanted: LogprobArrays) -> Any:
    """What rows want of log-probabilities as a build's `step` and `logprobs` take it."""
    return module.Logprobs(wanted.counts, wanted.targets, wanted.tokens, wanted.logprobs, wanted.ranks)


def team_layout(module: ModuleType, ranks: Ranks) -> Any:
    """Ranks as the build's team takes them."""
    return module.TeamLayout(
        threads=list(ranks.threads),
        cpus=[list(cpus) for cpus in ranks.cpus],
        stall_seconds=ranks.stall_timeout,
        exit_status=ranks.exit_status,
    )


def native_matrix(tensor: PackedTensor) -> tuple[Any, int, int, int, bool]:
    """A packed tensor as the extension modules take it: (data uint8, outputs, inputs, bits, has mins)."""
    fmt = tensor.format
    assert fmt is not None
    return tensor.data, fmt.n, fmt.k, fmt.bits, fmt.correction is Correction.MIN


class RopeTables:
    """cos and sin of each pair's angle at each position, computed in float64 as far as steps have reached.

    All positions of a long context would take most of a second and 64 MB at every start. Their rows are allocated at
    once, so that they never move, but take memory only where they are written.
    """

    def __init__(self, rope: RopeSpec, max_position: int) -> None:
        self._frequencies, self._factor = rope.frequencies(max_position), rope.attention_factor
        self.cos = np.empty((max_position, rope.dim // 2), np.float32)  # rows from num_ready on are not written yet
        self.sin = np.empty_like(self.cos)
        self.num_ready = 0

    def reach(self, num_positions: int) -> None:
        """Make the rows of positions 0 to num_positions - 1 (at most max_position) ready."""
        if num_positions <= self.num_ready:
            return
        end = min(-(-num_positions // ROPE_PIECE) * ROPE_PIECE, len(self.cos))
        angles = np.arange(self.num_ready, end)[:, None] * self._frequencies
        self.cos[self.num_ready : end] = np.cos(angles) * self._factor
        self.sin[self.num_ready : end] = np.sin(angles) * self._factor
        self.num_ready = end
