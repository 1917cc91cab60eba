from __future__ import annotations

import numpy as np
import pytest

from engine.models.recipe import Part, Recipe


def test_parts_are_stacked_in_order() -> None:
    recipe = Recipe("x", (Part("a", (3, 32)), Part("b", (2, 32))))
    parts, rows = recipe.rows()
    assert recipe.shape == (5, 32)
    assert parts.tolist() == [0, 0, 0, 1, 1]
    assert rows.tolist() == [0, 1, 2, 0, 1]


def test_blocks_alternate_between_parts() -> None:
    recipe = Recipe("gate_up", (Part("gate", (64, 32)), Part("up", (64, 32))), block=32)
    parts, rows = recipe.rows()
    assert parts.tolist() == [0] * 32 + [1] * 32 + [0] * 32 + [1] * 32
    assert rows.tolist() == [*range(32), *range(32), *range(32, 64), *range(32, 64)]


def test_blocks_of_unequal_parts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"equal rows, a multiple of 32, got \[64, 32\]"):
        Recipe("x", (Part("a", (64, 32)), Part("b", (32, 32))), block=32).rows()


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 16), (3, 64), (4, 16)])
def test_interleaved_heads_are_undone(heads: int, head_dim: int) -> None:
    # What the converter does to a half-split checkpoint, written as its own loop.
    stored = np.empty(heads * head_dim, np.int64)
    for head in range(heads):
        for i in range(head_dim // 2):
            stored[head * head_dim + 2 * i] = head * head_dim + i
            stored[head * head_dim + 2 * i + 1] = head * head_dim + i + head_dim // 2
    _, rows = Recipe("q", (Part("q", (heads * head_dim, 32), interleaved_heads=heads),)).rows()
    assert stored[rows].tolist() == list(range(heads * head_dim))


def test_rope_of_reordered_rows_is_the_interleaved_rope_of_stored_ones() -> None:
    heads, dim = 2, 16
    stored = np.random.default_rng(0).standard_normal((heads, dim))
    angles = 3.0 * 10000.0 ** (-np.arange(0, dim, 2) / dim)
    turned = stored[:, 0::2] + 1j * stored[:, 1::2]
    turned = turned * np.exp(1j * angles)

    _, rows = Recipe("q", (Part("q", (heads * dim, 32), interleaved_heads=heads),)).rows()
    half = stored.reshape(-1)[rows].reshape(heads, dim)
    first, second = half[:, : dim // 2], half[:, dim // 2 :]
    np.testing.assert_allclose(first * np.cos(angles) - second * np.sin(angles), turned.real)
    np.testing.assert_allclose(second * np.cos(angles) + first * np.sin(angles), turned.imag)
