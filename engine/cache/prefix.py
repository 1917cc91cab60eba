"""Reuse of computed prefixes: full blocks are found by a hash chain over their tokens.

The digest of a block covers its own tokens and, through its parent's digest, every token before it; the first parent
is a root drawn from the salt, the tenant and the adapter. Equal digests therefore mean equal keys and values, and
nobody can probe another tenant's prompts by timing. SHA-256, because a collision would answer with someone else's
context.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256

from engine.cache.blocks import BlockPool
from engine.config import BLOCK_SIZE

_BLOCK_FORMAT = struct.Struct(f"<{BLOCK_SIZE}I")


def root_digest(*, salt: str = "", tenant: str = "", adapter: str | None = None) -> bytes:
    """The parent of a sequence's first block. Fields are length-prefixed, so no two triples read the same."""
    digest = sha256()
    for value in (salt, tenant, adapter):
        raw = b"" if value is None else b"=" + value.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<Q", len(raw)) + raw)
    return digest.digest()


def block_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The digest of a full block of BLOCK_SIZE token ids that follows `parent`."""
    return sha256(parent + _BLOCK_FORMAT.pack(*token_ids)).digest()


class HashChain:
    """The digests of one growing sequence's full blocks, each computed once."""

    __slots__ = ("_digests", "_root")

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._digests: list[bytes] = []

    def extend(self, token_ids: Sequence[int], num_blocks: int) -> list[bytes]:
        """Digests of at least the first `num_blocks` blocks of `token_ids`, which may only have grown since."""
        digests = self._digests
        while len(digests) < num_blocks:
            start = len(digests) * BLOCK_SIZE
            parent = digests[-1] if digests else self._root
            digests.append(block_digest(parent, token_ids[start : start + BLOCK_SIZE]))
        return digests


class PrefixCache:
    """A pool of KV blocks together with the index that finds full ones by digest. Disabled, it never finds any."""

    def __init__(self, num_blocks: int, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.pool = BlockPool(num_blocks, on_evict=self._forget)
        self.num_hit_blocks = 0
        self.num_missed_blocks = 0
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def lookup(self, chain: HashChain, token_ids: Sequence[int]) -> list[int]:
        """Blocks that hold the longest cached prefix of `token_ids`; takes no reference and counts nothing.

        The last token is never among them: its logits have to be computed.
        """
        if not self.enabled:
            return []
        blocks = []
        limit = (len(token_ids) - 1) // BLOCK_SIZE
        for digest in chain.extend(token_ids, limit)[:limit]:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Sequence[int], *, of: int) -> None:
        """Take a reference to each of the `blocks` just looked up, and count them as hits `of` so many wanted."""
        for block in blocks:
            self.pool.share(block)
        if self.enabled:
            self.num_hit_blocks += len(blocks)
            self.num_missed_blocks += of - len(blocks)

    def register(self, block: int, digest: bytes) -> None:
        """Make a referenced block findable, once its keys and values are computed.

        Where two sequences computed the same prefix at the same time, the first block stays the one that is found and
        the second goes blank on release: its holder's block table must not change under a running step.
        """
        if self.enabled and digest not in self._block_of:
            assert block not in self._digest_of, f"block {block} is registered under another digest"
            self._block_of[digest] = block
            self._digest_of[block] = digest
            self.pool.keep(block)

    def _forget(self, block: int) -> None:
        del self._block_of[self._digest_of.pop(block)]

    def check_integrity(self, held: list[list[int]] | None = None) -> None:
        """Raise AssertionError if pool and index disagree; `held` as in BlockPool.check_integrity."""
        self.pool.check_integrity(held)
        assert len(self._block_of) == len(self._digest_of), (
            f"{len(self._block_of)} digests point to blocks, {len(self._digest_of)} blocks have a digest"
        )
        for digest, block in self._block_of.items():
            assert self._digest_of.get(block) == digest, f"block {block} is indexed under a digest that is not its own"
            assert self.pool.is_kept(block), f"block {block} is indexed, but the pool would not keep it"
        assert self.pool.num_idle <= len(self._block_of), "an idle block is in no index"
