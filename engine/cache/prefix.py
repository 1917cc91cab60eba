"""Reuse of computed prefixes: full blocks are found by a hash chain over their tokens.

The digest of a block covers its own tokens and, through its parent's digest, every token before it; the first parent
is a root drawn from the salt, the tenant and the adapter. Equal digests therefore mean equal keys and values, and
nobody can probe another tenant's prompts by timing. SHA-256, because a collision would answer with someone else's
context.

Where prompts part within a block, its beginning is found too, in the lengths of PARTS: whoever shares it copies the
block and computes the rest. The system prompt of a chat template is often no longer than that.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256

from engine.cache.blocks import BlockPool
from engine.config import BLOCK_SIZE

PARTS = tuple(range(BLOCK_SIZE * 3 // 4, 0, -BLOCK_SIZE // 4))
"""Tokens of the beginnings of blocks that can be found, longest first."""

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


def part_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The digest of the first token ids of a block that follows `parent`; no block's, for it covers fewer of them."""
    return sha256(parent + struct.pack(f"<{len(token_ids)}I", *token_ids)).digest()


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

    def part(self, token_ids: Sequence[int], index: int, size: int) -> bytes:
        """The digest of the first `size` tokens of block `index`."""
        parent = self.extend(token_ids, index)[index - 1] if index else self._root
        return part_digest(parent, token_ids[index * BLOCK_SIZE : index * BLOCK_SIZE + size])


class PrefixCache:
    """A pool of KV blocks together with the index that finds full ones by digest. Disabled, it never finds any."""

    def __init__(self, num_blocks: int, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.pool = BlockPool(num_blocks, on_evict=self._forget)
        self.num_hit_blocks = 0
        self.num_missed_blocks = 0
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._block_of_part: dict[bytes, int] = {}
        self._parts_of: dict[int, list[bytes]] = {}

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

    def lookup_part(self, chain: HashChain, token_ids: Sequence[int], index: int) -> tuple[int, int] | None:
        """Where the first `index` blocks of `token_ids` are cached and no more: a block that begins as theirs goes on,
        and how many of its tokens are the same. Takes no reference; the last token is never among them."""
        if not self.enabled:
            return None
        limit = len(token_ids) - 1 - index * BLOCK_SIZE
        for size in PARTS:
            if size <= limit:
                block = self._block_of_part.get(chain.part(token_ids, index, size))
                if block is not None:
                    return block, size
        return None

    def acquire(self, blocks: Sequence[int], *, of: int) -> None:
        """Take a reference to each of the `blocks` just looked up, and count them as hits `of` so many wanted."""
        for block in blocks:
            self.pool.share(block)
        if self.enabled:
            self.num_hit_blocks += len(blocks)
            self.num_missed_blocks += of - len(blocks)

    def register(self, block: int, digest: bytes, parts: Sequence[bytes] = ()) -> None:
        """Make a referenced block findable, and by `parts` its beginnings, once its keys and values are computed.

        Where two sequences computed the same prefix at the same time, the first block stays the one that is found and
        the second goes blank on release: its holder's block table must not change under a running step.
        """
        if self.enabled and digest not in self._block_of:
            assert block not in self._digest_of, f"block {block} is registered under another digest"
            self._block_of[digest] = block
            self._digest_of[block] = digest
            new = [part for part in parts if part not in self._block_of_part]
            self._block_of_part.update(dict.fromkeys(new, block))
            self._parts_of[block] = new
            self.pool.keep(block)

    def _forget(self, block: int) -> None:
        del self._block_of[self._digest_of.pop(block)]
        for part in self._parts_of.pop(block):
            del self._block_of_part[part]

    def check_integrity(self, held: list[list[int]] | None = None) -> None:
        """Raise AssertionError if pool and index disagree; `held` as in BlockPool.check_integrity."""
        self.pool.check_integrity(held)
        assert len(self._block_of) == len(self._digest_of), (
            f"{len(self._block_of)} digests point to blocks, {len(self._digest_of)} blocks have a digest"
        )
        for digest, block in self._block_of.items():
            assert self._digest_of.get(block) == digest, f"block {block} is indexed under a digest that is not its own"
            assert self.pool.is_kept(block), f"block {block} is indexed, but the pool would not keep it"
        assert self._parts_of.keys() == self._digest_of.keys(), "a block has parts and no digest, or none of both"
        parts = {part: block for block, parts in self._parts_of.items() for part in parts}
        assert parts == self._block_of_part, "a part is indexed under a block that is not its own"
        assert self.pool.num_idle <= len(self._block_of), "an idle block is in no index"
