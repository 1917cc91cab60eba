"""What every kernel build refuses before it writes anything: weights once, a step's arrays on every step.

Native builds decide about a step themselves (csrc/check.cpp): an index that passes there cannot leave the memory it
points into. What they refuse comes here for the words, so that the two have to agree; the numpy twin knows these checks
alone. Messages are built only when something is wrong. Comparisons are written so that NaN fails them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import BLOCK_SIZE
from engine.kernels.batch import LogprobArrays, SamplingArrays, StepBatch, TextBatch, Weights
from engine.kernels.layout import PackedTensor
from engine.models.spec import DecoderSpec, EncoderSpec

_INF = np.float32(np.inf)
_FLOAT32, _INT32, _UINT8 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.uint8)
_UINT32, _UINT64 = np.dtype(np.uint32), np.dtype(np.uint64)


def check_weights(spec: DecoderSpec | EncoderSpec, weights: Weights) -> None:
    """Raise ValueError unless `weights` holds exactly the tensors of `spec`, each with its shape and data."""
    shapes = spec.tensor_shapes()
    if missing := sorted(shapes.keys() - weights.keys()):
        raise ValueError(f"weights: expected {len(shapes)} tensors, missing {missing[:5]}")
    if extra := sorted(weights.keys() - shapes.keys()):
        raise ValueError(f"weights: expected {len(shapes)} tensors, got also {extra[:5]}")
    for name, shape in shapes.items():
        tensor = weights[name]
        if not isinstance(tensor, PackedTensor):
            raise ValueError(f"weights[{name!r}]: expected a PackedTensor, got {type(tensor).__name__}")
        fmt = tensor.format
        if fmt is None:
            _check_array(f"weights[{name!r}]", tensor.data, _FLOAT32, shape)
        elif len(shape) != 2 or (fmt.n, fmt.k) != shape:
            raise ValueError(f"weights[{name!r}]: expected shape {list(shape)}, got {[fmt.n, fmt.k]}")
        else:
            _check_array(f"weights[{name!r}]", tensor.data, _UINT8, (fmt.nbytes,))


def check_batch(spec: DecoderSpec, batch: StepBatch, num_blocks: int, previous_rows: int) -> None:
    """Raise ValueError, with what was expected and what came, unless `batch` can be computed as it stands.

    `num_blocks` is the size of the program's KV memory, `previous_rows` the number of tokens that its previous step
    chose (what a deferred token id may refer to).
    """
    num_tokens, num_requests = batch.token_ids.size, batch.seq_lens.size
    if num_tokens < 1 or num_requests < 1:
        raise ValueError(f"a step needs at least 1 token and 1 request, got {num_tokens} and {num_requests}")
    _check_array("token_ids", batch.token_ids, _INT32, (num_tokens,))
    _check_range("token_ids", batch.token_ids, -previous_rows, spec.vocab_size)
    _check_positions(spec, batch, num_tokens, num_requests)
    _check_blocks(batch, num_requests, num_blocks)

    if batch.adapters is not None:
        _check_array("adapters", batch.adapters, _INT32, (num_tokens,))
        _check_range("adapters", batch.adapters, -1, 0)  # this engine has loaded none

    rows = batch.logits_rows
    num_rows = rows.size
    _check_array("logits_rows", rows, _INT32, (num_rows,))
    if num_rows and not (rows[0] >= 0 and rows[-1] < num_tokens and (rows[1:] > rows[:-1]).all()):
        raise ValueError(f"logits_rows: expected ascending indices in [0, {num_tokens}), got {rows.tolist()}")
    if batch.logits is not None:
        _check_output("logits", batch.logits, (num_rows, spec.vocab_size))
    if batch.hidden is not None:
        _check_output("hidden", batch.hidden, (num_rows, spec.hidden_size))
    if batch.sampling is not None:
        _check_sampling(batch.sampling, num_rows, spec.vocab_size)
    if batch.logprobs is not None:
        if batch.sampling is None:
            raise ValueError("logprobs: expected sampling beside them, got none")
        _check_logprobs(batch.logprobs, num_rows, spec.vocab_size)


def check_texts(spec: EncoderSpec, batch: TextBatch, max_tokens: int) -> None:
    """Raise ValueError, with what was expected and what came, unless `batch` can be computed as it stands."""
    num_tokens, num_texts = batch.token_ids.size, batch.starts.size - 1
    if not 1 <= num_tokens <= max_tokens or num_texts < 1:
        raise ValueError(
            f"a batch needs 1 to {max_tokens} tokens and at least 1 text, got {num_tokens} and {num_texts}"
        )
    _check_array("token_ids", batch.token_ids, _INT32, (num_tokens,))
    _check_range("token_ids", batch.token_ids, 0, spec.vocab_size)
    _check_array("types", batch.types, _INT32, (num_tokens,))
    _check_range("types", batch.types, 0, spec.num_types)
    _check_array("starts", batch.starts, _INT32, (num_texts + 1,))
    lengths = np.diff(batch.starts)
    if not (
        batch.starts[0] == 0
        and batch.starts[-1] == num_tokens
        and ((lengths >= 1) & (lengths <= spec.max_position)).all()
    ):
        raise ValueError(
            f"starts: expected to rise from 0 to {num_tokens} by 1 to {spec.max_position} each, "
            f"got {batch.starts.tolist()}"
        )
    _check_output("out", batch.out, (num_texts, spec.output_size))


def check_copies(pairs: NDArray[Any], num_blocks: int) -> None:
    """Raise ValueError unless `pairs` is int32 [n, 2] of block indices, no target twice or also a source."""
    _check_array("pairs", pairs, _INT32, (len(pairs), 2))
    _check_range("pairs", pairs, 0, num_blocks)
    targets = pairs[:, 1]
    if len(np.unique(targets)) != len(targets) or np.isin(targets, pairs[:, 0]).any():
        raise ValueError(f"pairs: expected each target once and as no pair's source, got {pairs.tolist()}")


def _check_positions(spec: DecoderSpec, batch: StepBatch, num_tokens: int, num_requests: int) -> None:
    starts, seq_lens = batch.query_starts, batch.seq_lens
    _check_array("query_starts", starts, _INT32, (num_requests + 1,))
    _check_array("seq_lens", seq_lens, _INT32, (num_requests,))
    _check_array("positions", batch.positions, _INT32, (num_tokens,))
    counts = starts[1:] - starts[:-1]
    if not (starts[0] == 0 and starts[-1] == num_tokens and (counts >= 1).all()):
        raise ValueError(
            f"query_starts: expected to rise from 0 to {num_tokens} by at least 1 each, got {starts.tolist()}"
        )
    if not ((seq_lens >= counts) & (seq_lens <= spec.max_position)).all():
        raise ValueError(
            f"seq_lens: expected from the request's own tokens {counts.tolist()} to max_position {spec.max_position}, "
            f"got {seq_lens.tolist()}"
        )
    # A request's tokens are the last ones of its sequence.
    expected = np.arange(num_tokens, dtype=np.int32)
    expected += np.repeat(seq_lens - starts[1:], counts)
    if not (wrong := batch.positions != expected).any():
        return
    t = int(wrong.argmax())
    raise ValueError(
        f"positions: expected consecutive ones that end at seq_lens - 1, so {expected[t]} for token {t}, "
        f"got {batch.positions[t]}"
    )


def _check_blocks(batch: StepBatch, num_requests: int, num_blocks: int) -> None:
    tables = batch.block_tables
    if tables.ndim != 3:
        raise ValueError(f"block_tables: expected [1, {num_requests}, max_blocks], got {list(tables.shape)}")
    _check_array("block_tables", tables, _INT32, (1, num_requests, tables.shape[2]))
    needed = (batch.seq_lens + (BLOCK_SIZE - 1)) // BLOCK_SIZE
    longest = int(needed.max())
    if tables.shape[2] < longest:
        raise ValueError(f"block_tables: expected room for {longest} blocks a request, got {tables.shape[2]}")
    # As uint32 a negative entry is a huge one, so one comparison sees both ends. Entries past the sequence are unread.
    wrong = tables[0, :, :longest].view(np.uint32) >= num_blocks
    wrong &= np.arange(longest) < needed[:, None]
    if wrong.any():
        q, i = np.argwhere(wrong)[0]
        raise ValueError(
            f"block_tables: expected blocks in [0, {num_blocks}), got {tables[0, q, i]} at entry {i} of request {q}"
        )


def _check_sampling(sampling: SamplingArrays, num_rows: int, vocab_size: int) -> None:
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        _check_array(name, getattr(sampling, name), _FLOAT32, (num_rows,))
    for name in ("top_k", "choice", "position", "history_output_starts"):
        _check_array(name, getattr(sampling, name), _INT32, (num_rows,))
    _check_array("seed", sampling.seed, _UINT64, (num_rows,))
    s = sampling
    ok = (s.temperature >= 0) & (s.top_p > 0) & (s.top_p <= 1) & (s.min_p >= 0) & (s.min_p <= 1)
    ok &= (s.repetition_penalty > 0) & (s.position >= 0)
    # A sum is finite only where each term is.
    ok &= np.isfinite(s.temperature + s.repetition_penalty + s.presence_penalty + s.frequency_penalty)
    if not ok.all():
        r = int(ok.argmin())
        raise ValueError(
            f"sampling of row {r}: expected temperature >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, repetition_penalty > 0, "
            f"position >= 0, all finite, got temperature {s.temperature[r]}, top_p {s.top_p[r]}, min_p "
            f"{s.min_p[r]}, repetition_penalty {s.repetition_penalty[r]}, position {s.position[r]}, presence_penalty "
            f"{s.presence_penalty[r]}, frequency_penalty {s.frequency_penalty[r]}"
        )

    _check_ragged("history", s.history_starts, s.history_tokens, num_rows, vocab_size)
    if not (
        (s.history_output_starts >= s.history_starts[:-1]) & (s.history_output_starts <= s.history_starts[1:])
    ).all():
        raise ValueError(
            f"history_output_starts: expected within each row's history {s.history_starts.tolist()}, "
            f"got {s.history_output_starts.tolist()}"
        )
    _check_ragged("bias", s.bias_starts, s.bias_tokens, num_rows, vocab_size)
    _check_array("bias_values", s.bias_values, _FLOAT32, s.bias_tokens.shape)
    if len(s.bias_values) and not (s.bias_values < _INF).all():
        raise ValueError(f"bias_values: expected finite values or -inf, got {s.bias_values.tolist()}")
    if s.again is not None:
        _check_array("again", s.again, _INT32, (num_rows,))


def check_again(sampling: SamplingArrays | None, row: int, mask: NDArray[np.uint32], vocab_size: int) -> None:
    """What `Program.choose_again` is asked, after a step with `sampling`. Raises ValueError."""
    again = None if sampling is None else sampling.again
    if again is None or not 0 <= row < len(again) or not again[row]:
        kept = [] if again is None else np.flatnonzero(again).tolist()
        raise ValueError(f"row: expected one that the last step kept, {kept}, got {row}")
    _check_array("mask", mask, _UINT32, ((vocab_size + 31) // 32,))


def _check_logprobs(wanted: LogprobArrays, num_rows: int, vocab_size: int) -> None:
    if wanted.tokens.ndim != 2 or wanted.tokens.shape[1] < 1:
        raise ValueError(
            f"logprob tokens: expected [{num_rows}, 1 + most of the counts], got {list(wanted.tokens.shape)}"
        )
    width = wanted.tokens.shape[1]
    _check_array("logprob counts", wanted.counts, _INT32, (num_rows,))
    _check_range("logprob counts", wanted.counts, -1, width)
    _check_array("logprob targets", wanted.targets, _INT32, (num_rows,))
    _check_range("logprob targets", wanted.targets, -1, vocab_size)
    _check_array("logprob tokens", wanted.tokens, _INT32, (num_rows, width))
    _check_array("logprobs", wanted.logprobs, _FLOAT32, (num_rows, width))
    _check_array("logprob ranks", wanted.ranks, _INT32, (num_rows,))


def _check_ragged(
    name: str, starts: NDArray[np.int32], tokens: NDArray[np.int32], num_rows: int, vocab_size: int
) -> None:
    """Rows of token ids one after another: `starts` rises from 0 to the number of `tokens`, all in the vocabulary."""
    _check_array(f"{name}_starts", starts, _INT32, (num_rows + 1,))
    _check_array(f"{name}_tokens", tokens, _INT32, (len(tokens),))
    if not (starts[0] == 0 and starts[-1] == len(tokens) and (starts[1:] >= starts[:-1]).all()):
        raise ValueError(f"{name}_starts: expected to rise from 0 to {len(tokens)}, got {starts.tolist()}")
    _check_range(f"{name}_tokens", tokens, 0, vocab_size)


def _check_range(name: str, values: NDArray[np.int32], low: int, high: int) -> None:
    """Every value in [low, high)."""
    # Shifted to start at 0 and read as uint32 (modulo 2**32), both ends are one comparison.
    if not values.size or np.maximum.reduce((values - low).view(np.uint32), axis=None) < high - low:
        return
    wrong = (values < low) | (values >= high)
    raise ValueError(f"{name}: expected values in [{low}, {high}), got {values[wrong][:5].tolist()}")


def _check_array(name: str, array: NDArray[Any], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        layout = "" if array.flags.c_contiguous else ", not contiguous"
        raise ValueError(
            f"{name}: expected {dtype.name} {list(shape)}, got {array.dtype.name} {list(array.shape)}{layout}"
        )


def _check_output(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    _check_array(name, array, _FLOAT32, shape)
    if not array.flags.writeable:
        raise ValueError(f"{name}: expected a writeable array, got a read-only one")
