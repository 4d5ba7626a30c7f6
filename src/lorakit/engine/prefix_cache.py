"""What prompts that begin alike have of the past, so that it is computed once for each adapter.

A radix tree for each adapter (RadixAttention, Zheng et al. 2023, arXiv:2312.07104): an edge holds
some tokens with their keys and values. What layers with a window or a state keep has no positions,
so that it is there at the ends of edges alone, where a prompt ended or another one went its own way
(Marconi, Pan et al. 2024, arXiv:2411.19379). What was used least recently makes room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from lorakit.engine.cache import RowCache

Tensors = list[list[torch.Tensor]]
"""Of each layer."""

PREFIX_BYTES = 512 << 20

LEAST = 16
"""Tokens that a shared beginning has at least, as many as what templates write before a first
message; copying fewer saves little."""
LEAST_ALONE = 256
"""The same where the rest of a prompt is read alone, and whole prompts could be read together."""


@dataclass(eq=False)
class _Node:
    """The end of an edge.

    Attributes:
        tokens: of the edge.
        part: what layers keep of these by position, (heads, tokens, d) each.
        states: what the others keep, behind these; None where nobody has been here.
        logits: (vocabulary,) of the last one, if a prompt ended here.
        used: when it was, in the cache's own time.
    """

    tokens: tuple[int, ...]
    part: Tensors
    parent: _Node | None = None
    children: dict[int, _Node] = field(default_factory=dict)
    states: Tensors | None = None
    logits: torch.Tensor | None = None
    used: int = 0

    @property
    def size(self) -> int:
        """In bytes."""
        own = 0 if self.logits is None else self.logits.nbytes
        return own + _bytes(self.part) + _bytes(self.states or [])


@dataclass(frozen=True)
class Prefix:
    """The beginning of a prompt that need not be computed.

    Attributes:
        length: its tokens.
        logits: (vocabulary,) of the last token, where it is the whole prompt; else None.
        branch: where another prompt with more of the same beginning went its own way, behind
            `length`; 0 where there is none.
    """

    length: int = 0
    logits: torch.Tensor | None = None
    branch: int = 0
    path: tuple[tuple[_Node, int], ...] = field(default=(), repr=False)


class PrefixCache:
    """Beginnings of the prompts of one model.

    An adapter's name, and the salt of a request behind it, stand for values that do not change:
    whoever changes them calls `forget`.

    Args:
        limit: how many bytes it may take.
        keeps_answers: a prompt that goes on from an answer, as a chat does, is to find it here.

    Attributes:
        queries: tokens of prompts that were looked for.
        hits: those of them that need not be computed.
        size: in bytes.
    """

    def __init__(self, limit: int = PREFIX_BYTES, keeps_answers: bool = False) -> None:
        self.keeps_answers = keeps_answers
        self.queries = self.hits = self.size = 0
        self._limit, self._time = limit, 0
        self._roots: dict[str, _Node] = {}

    def find(
        self, adapter: str, tokens: Sequence[int], least: int, needs_snapshots: bool
    ) -> Prefix:
        """The longest beginning of a prompt that is here.

        It is shorter than the prompt, unless the logits of its last token are here.

        Args:
            least: how many tokens it must have, if it is not the whole prompt.
            needs_snapshots: the model has layers that keep something without positions.
        """
        path = [*self._walk(adapter, tokens)]
        matched = sum(taken for _, taken in path)
        if path and matched == len(tokens):
            node, taken = path[-1]
            if taken == len(node.tokens) and node.logits is not None:
                return Prefix(matched, node.logits, 0, tuple(path))
        length = min(matched, len(tokens) - 1)
        if needs_snapshots:
            length, use = 0, 0
            begin = 0
            for number, (node, taken) in enumerate(path, 1):
                begin += taken
                whole = taken == len(node.tokens) and node.states is not None
                if whole and begin < len(tokens):
                    length, use = begin, number
            path = path[:use]
        if length < least:
            length, path = 0, []
        branch = matched if needs_snapshots and length + least <= matched < len(tokens) else 0
        return Prefix(length, None, branch, tuple(path))

    def restore(self, prefix: Prefix, cache: RowCache, row: int) -> None:
        """Gives a row the past of its beginning."""
        self._time += 1
        begin = 0
        for node, taken in prefix.path:
            taken = min(taken, prefix.length - begin)
            node.used = self._time
            whole = taken == len(node.tokens)
            part = node.part if whole else [[t[:, :taken] for t in own] for own in node.part]
            cache.put_part(row, begin, part)
            begin += taken
        if prefix.path and (states := prefix.path[-1][0].states) is not None:
            cache.put_snapshot(row, states)

    def count(self, tokens: int, hits: int) -> None:
        """Notes that a prompt of so many tokens was looked for, and how many were here."""
        self.queries += tokens
        self.hits += hits

    def add(
        self,
        adapter: str,
        tokens: Sequence[int],
        cache: RowCache,
        row: int,
        logits: torch.Tensor | None = None,
    ) -> None:
        """Keeps what a row has of these tokens, its first ones and all that it has read.

        Args:
            logits: (vocabulary,) of the last one, if they are known.
        """
        self._time += 1
        node, begin = self._roots.setdefault(adapter, _Node((), [])), 0
        for found, taken in self._walk(adapter, tokens):
            begin += taken
            node = found if taken == len(found.tokens) else self._split(found, taken)
            node.used = self._time
        if begin < len(tokens):
            rest = tuple(tokens[begin:])
            new = _Node(rest, cache.part(row, begin, len(tokens)), node, used=self._time)
            if new.size > self._limit:
                return
            node.children[rest[0]] = node = new
            self.size += new.size
        before = node.size
        if cache.needs_snapshots and node.states is None:
            node.states = cache.snapshot(row, len(tokens))
        if node.logits is None and logits is not None:
            node.logits = logits.clone()
        self.size += node.size - before
        if self.size > self._limit:
            self._make_room()

    def forget(self, adapter: str) -> None:
        """Lets go of all that an adapter has here."""
        root = self._roots.pop(adapter, None)
        if root is not None:
            self.size -= sum(node.size for node in _below(root))

    def _walk(self, adapter: str, tokens: Sequence[int]) -> Iterator[tuple[_Node, int]]:
        """The nodes along `tokens`, and how many of each one's own tokens these have."""
        node, begin = self._roots.get(adapter), 0
        while node is not None and begin < len(tokens):
            node = node.children.get(tokens[begin])
            if node is None:
                return
            taken = common(node.tokens, tokens[begin : begin + len(node.tokens)])
            yield node, taken
            if taken < len(node.tokens):
                return
            begin += taken

    def _split(self, node: _Node, at: int) -> _Node:
        """Divides the edge to `node` behind so many tokens; returns the new node there."""
        parent = node.parent
        assert parent is not None
        # Copies, so that memory is free when either of the two goes.
        first = [[t[:, :at].clone() for t in own] for own in node.part]
        upper = _Node(node.tokens[:at], first, parent, used=node.used)
        parent.children[node.tokens[0]] = upper
        node.tokens, node.parent = node.tokens[at:], upper
        node.part = [[t[:, at:].clone() for t in own] for own in node.part]
        upper.children[node.tokens[0]] = node
        return upper

    def _make_room(self) -> None:
        """Removes ends of branches, those used least recently first, and some more than needed."""
        wanted = self._limit * 9 // 10
        while self.size > wanted:
            leaves = [
                node
                for root in self._roots.values()
                for node in _below(root)
                if not node.children and node is not root
            ]
            for leaf in sorted(leaves, key=lambda leaf: leaf.used):
                if self.size <= wanted:
                    break
                assert leaf.parent is not None
                del leaf.parent.children[leaf.tokens[0]]
                self.size -= leaf.size
        self._roots = {name: root for name, root in self._roots.items() if root.children}


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    if one == other:
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    differs = next((i for i, (a, b) in pairs if a != b), None)
    return min(len(one), len(other)) if differs is None else differs


def prefixes_of(prompts: Sequence[tuple[str, Sequence[int]]]) -> PrefixCache | None:
    """A cache for prompts that are all known; None where no two of an adapter begin alike.

    Args:
        prompts: each with its adapter's name.
    """
    ordered = sorted((adapter, tuple(tokens)) for adapter, tokens in prompts)
    alike = (
        one[0] == other[0] and common(one[1], other[1]) >= min(LEAST, len(one[1]))
        for one, other in pairwise(ordered)
    )
    return PrefixCache() if any(alike) else None


def _below(node: _Node) -> Iterator[_Node]:
    """A node and all below it."""
    left = [node]
    while left:
        one = left.pop()
        yield one
        left += one.children.values()


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for own in tensors for tensor in own if tensor is not None)
