from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cache.prefix import PARTS, HashChain, PrefixCache, block_digest, root_digest
from engine.config import BLOCK_SIZE

ROOT = root_digest()


def fill(cache: PrefixCache, tokens: list[int], root: bytes = ROOT) -> list[int]:
    """Allocate and register every full block of `tokens`."""
    num_blocks = len(tokens) // BLOCK_SIZE
    blocks = cache.pool.allocate(num_blocks)
    chain = HashChain(root)
    for index, (block, digest) in enumerate(zip(blocks, chain.extend(tokens, num_blocks), strict=True)):
        cache.register(block, digest, [chain.part(tokens, index, size) for size in PARTS])
    return blocks


def test_digest_is_sha256_over_parent_and_tokens() -> None:
    tokens = list(range(1000, 1000 + BLOCK_SIZE))
    raw = ROOT + b"".join(struct.pack("<I", token) for token in tokens)
    assert block_digest(ROOT, tokens) == hashlib.sha256(raw).digest()


fields = st.text(max_size=3)
triples = st.tuples(fields, fields, st.none() | fields)


@given(triples, triples)
def test_root_differs_where_salt_tenant_or_adapter_differs(
    a: tuple[str, str, str | None], b: tuple[str, str, str | None]
) -> None:
    roots = [root_digest(salt=s, tenant=t, adapter=d) for s, t, d in (a, b)]
    assert (roots[0] == roots[1]) == (a == b)


def test_root_fields_do_not_run_together() -> None:
    assert root_digest(salt="a", tenant="b") != root_digest(salt="ab")
    assert root_digest(adapter=None) != root_digest(adapter="")
    root_digest(salt="\ud800")  # a lone surrogate is a salt like any other


def test_chain_depends_on_every_earlier_token_and_on_the_root() -> None:
    tokens = list(range(3 * BLOCK_SIZE))
    other = [7, *tokens[1:]]
    digests = HashChain(ROOT).extend(tokens, 3)
    assert len(set(digests)) == 3
    assert not set(digests) & set(HashChain(ROOT).extend(other, 3))
    assert not set(digests) & set(HashChain(root_digest(tenant="t")).extend(tokens, 3))


def test_chain_grows_with_its_sequence() -> None:
    tokens = list(range(4 * BLOCK_SIZE))
    chain = HashChain(ROOT)
    first = list(chain.extend(tokens[:40], 1))
    assert chain.extend(tokens, 4) == HashChain(ROOT).extend(tokens, 4)
    assert chain.extend(tokens, 4)[:1] == first


def test_longest_prefix_is_found() -> None:
    cache = PrefixCache(8)
    tokens = list(range(4 * BLOCK_SIZE))
    blocks = fill(cache, tokens)
    assert cache.lookup(HashChain(ROOT), [*tokens, 5]) == blocks
    diverging = [*tokens[: 2 * BLOCK_SIZE], 9, *tokens[2 * BLOCK_SIZE + 1 :], 5]
    assert cache.lookup(HashChain(ROOT), diverging) == blocks[:2]
    assert cache.lookup(HashChain(root_digest(salt="s")), [*tokens, 5]) == []


@pytest.mark.parametrize(
    ("num_tokens", "num_found"),
    [(1, 0), (BLOCK_SIZE, 0), (BLOCK_SIZE + 1, 1), (2 * BLOCK_SIZE, 1), (2 * BLOCK_SIZE + 1, 2)],
)
def test_the_last_token_is_always_left_to_compute(num_tokens: int, num_found: int) -> None:
    cache = PrefixCache(8)
    tokens = list(range(3 * BLOCK_SIZE))
    fill(cache, tokens)
    assert len(cache.lookup(HashChain(ROOT), tokens[:num_tokens])) == num_found


def test_duplicates_keep_the_first() -> None:
    cache = PrefixCache(4)
    tokens = list(range(BLOCK_SIZE))
    first, second = fill(cache, tokens), fill(cache, tokens)
    assert first != second
    assert cache.lookup(HashChain(ROOT), [*tokens, 1]) == first
    cache.pool.release(second)
    assert cache.pool.num_idle == 0
    cache.pool.release(first)
    assert cache.pool.num_idle == 1
    cache.check_integrity([])


def test_an_evicted_block_is_not_found() -> None:
    cache = PrefixCache(2)
    tokens = list(range(2 * BLOCK_SIZE))
    blocks = fill(cache, tokens)
    cache.pool.release(reversed(blocks))
    cache.pool.allocate(1)  # takes the tail: a prefix outlives what follows it
    assert cache.lookup(HashChain(ROOT), [*tokens, 1]) == blocks[:1]
    cache.check_integrity()


def test_hits_and_misses_are_counted_in_blocks() -> None:
    cache = PrefixCache(4)
    tokens = list(range(2 * BLOCK_SIZE))
    cache.pool.release(fill(cache, tokens))
    cache.acquire(cache.lookup(HashChain(ROOT), [*tokens, *range(BLOCK_SIZE)]), of=3)
    assert (cache.num_hit_blocks, cache.num_missed_blocks) == (2, 1)


def test_disabled_it_finds_and_keeps_nothing() -> None:
    cache = PrefixCache(4, enabled=False)
    tokens = list(range(BLOCK_SIZE))
    blocks = fill(cache, tokens)
    assert cache.lookup(HashChain(ROOT), [*tokens, 1]) == []
    cache.pool.release(blocks)
    assert cache.pool.num_idle == 0


def test_integrity_notices_a_wrong_index() -> None:
    cache = PrefixCache(4)
    (block,) = fill(cache, list(range(BLOCK_SIZE)))
    cache._digest_of[block] = b"another"
    with pytest.raises(AssertionError, match=f"block {block} is indexed under a digest that is not its own"):
        cache.check_integrity()


@pytest.mark.parametrize(
    ("num_same", "num_found"), [(7, None), (8, 8), (15, 8), (16, 16), (23, 16), (24, 24), (31, 24)]
)
@pytest.mark.parametrize("index", [0, 1])
def test_the_beginning_of_a_block_is_found(num_same: int, num_found: int | None, index: int) -> None:
    cache = PrefixCache(8)
    tokens = list(range(2 * BLOCK_SIZE))
    blocks = fill(cache, tokens)
    parting = [*tokens[: index * BLOCK_SIZE + num_same], *range(900, 950)]
    assert cache.lookup(HashChain(ROOT), parting) == blocks[:index]
    found = None if num_found is None else (blocks[index], num_found)
    assert cache.lookup_part(HashChain(ROOT), parting, index) == found
    assert cache.lookup_part(HashChain(root_digest(tenant="t")), parting, index) is None


@pytest.mark.parametrize(("num_tokens", "num_found"), [(8, None), (9, 8), (24, 16), (25, 24), (32, 24)])
def test_the_last_token_of_a_beginning_is_left_to_compute(num_tokens: int, num_found: int | None) -> None:
    cache = PrefixCache(8)
    (block,) = fill(cache, list(range(BLOCK_SIZE)))
    found = cache.lookup_part(HashChain(ROOT), list(range(num_tokens)), 0)
    assert found == (None if num_found is None else (block, num_found))


def test_a_beginning_goes_with_its_block() -> None:
    cache = PrefixCache(2)
    tokens = list(range(BLOCK_SIZE))
    first, second = fill(cache, tokens), fill(cache, [*tokens[:20], *range(900, 912)])
    assert cache.lookup_part(HashChain(ROOT), [*tokens[:20], 5], 0) == (first[0], 16)  # the first stays the one
    cache.pool.release(first)
    assert cache.pool.allocate(1) == first
    assert cache.lookup_part(HashChain(ROOT), [*tokens[:20], 5], 0) is None
    cache.check_integrity([first, second])


def test_disabled_it_finds_no_beginning() -> None:
    cache = PrefixCache(4, enabled=False)
    fill(cache, list(range(BLOCK_SIZE)))
    assert cache.lookup_part(HashChain(ROOT), list(range(20)), 0) is None
