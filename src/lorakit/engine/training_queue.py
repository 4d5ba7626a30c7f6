"""Training operations of many tenants on one resident base: each one's in order, rows together.

A tenant is an adapter, and belongs to an owner. A tenant's operations are executed in the order in
which they were handed in. Rows that several tenants wait for with share a pass, in which those are
first whose owners have been served the fewest tokens so far: an owner with many tenants or many
rows takes nothing from others. Whoever computes calls `tick` between other work, on the one thread
that uses the model.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

import torch

from lorakit.engine.adapter_memory import AdapterMemory
from lorakit.engine.fair_share import FairShare
from lorakit.engine.resident import ResidentModel
from lorakit.engine.token_losses import AdapterRow, PassResult, TokenLoss
from lorakit.errors import InputError, LorakitError

T = TypeVar("T")
Item = TypeVar("Item")

PASS_TOKENS = 2560
"""How many tokens of all tenants together go through the model at a time."""


@dataclass(eq=False)
class _Call:
    work: Callable[[], Any]
    owner: str
    tokens: int = 0
    future: Future[Any] = field(default_factory=Future)


@dataclass(eq=False)
class _Joint:
    work: Callable[[Sequence[Any]], Sequence[Any]]
    item: Any
    owner: str
    tokens: int
    most: int
    future: Future[Any] = field(default_factory=Future)


@dataclass(eq=False)
class _Pass:
    rows: Sequence[AdapterRow]
    loss: TokenLoss
    learning: bool
    owner: str
    future: Future[Any] = field(default_factory=Future)
    logprobs: list[torch.Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def done(self) -> int:
        return len(self.logprobs)


_Operation = _Call | _Joint | _Pass


class TrainingQueue:
    """Operations that wait for the thread that computes.

    Args:
        resident: the base and its adapters.
        wake: is called when there is something new to do, from any thread.
        pass_tokens: the most tokens of a pass; a longer row has one of its own.

    Attributes:
        memory: which adapters are in memory; None is all.
        passes: how many passes there were.
        shared: in how many of them rows of several tenants were.
        tokens: how many tokens have gone through, by owner.
    """

    def __init__(
        self,
        resident: ResidentModel,
        wake: Callable[[], None] = lambda: None,
        pass_tokens: int = PASS_TOKENS,
    ) -> None:
        self._resident, self._wake, self._pass_tokens = resident, wake, pass_tokens
        self._queues: dict[str | int, deque[_Operation]] = {}
        self._alone = itertools.count()
        self._lock = Lock()
        self._closed = False
        self._fair = FairShare()
        self.memory: AdapterMemory | None = None
        self.passes = self.shared = 0
        self.tokens: dict[str, int] = {}

    # --- for those who ask, from any thread -------------------------------------------------

    def call(
        self, tenant: str | None, work: Callable[[], T], *, owner: str = "", tokens: int = 0
    ) -> Future[T]:
        """Has `work` executed on the computing thread, behind what the tenant handed in before.

        Without a tenant it is behind nothing.

        Args:
            owner: whose it is; by default the tenant is its own.
            tokens: what it costs; it waits for its turn if it costs any.
        """
        place = next(self._alone) if tenant is None else tenant
        return self._add(place, _Call(work, owner or str(place), tokens))

    def together(
        self,
        work: Callable[[Sequence[Item]], Sequence[T]],
        item: Item,
        *,
        owner: str,
        tokens: int,
        most: int,
    ) -> Future[T]:
        """Has `work` executed with this item and others that wait for the same `work`.

        Where it fails, each of them is tried by itself.

        Args:
            work: gives a result for each of its items.
            tokens: what the item costs. As many go together as fit into a pass, padded.
            most: how many items go together.
        """
        return self._add(next(self._alone), _Joint(work, item, owner, tokens, most))

    def forward_backward(
        self,
        tenant: str,
        rows: Sequence[AdapterRow],
        loss: TokenLoss,
        *,
        learning: bool = True,
        owner: str = "",
    ) -> Future[PassResult]:
        """`ResidentModel.forward_backward` of rows; without `learning`, `forward`.

        Where it fails, the gradients that the tenant has accumulated are dropped.
        """
        return self._add(tenant, _Pass(list(rows), loss, learning, owner or tenant))

    def over_rows(
        self, rows: Sequence[AdapterRow], loss: TokenLoss, *, learning: bool
    ) -> PassResult:
        """`forward_backward` of rows of several tenants, whose end is waited for."""
        places: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            places.setdefault(row.adapter, []).append(i)
        futures = [
            self.forward_backward(tenant, [rows[i] for i in own], loss, learning=learning)
            for tenant, own in places.items()
        ]
        found = [future.result() for future in futures]
        logprobs, losses = [torch.empty(0)] * len(rows), [0.0] * len(rows)
        for own, part in zip(places.values(), found, strict=True):
            for i, row_logprobs, value in zip(own, part.logprobs, part.losses, strict=True):
                logprobs[i], losses[i] = row_logprobs, value
        return PassResult(logprobs, losses)

    def waiting(self) -> bool:
        """Whether there is something to do."""
        return any(self._queues.values())

    def waiting_tokens(self) -> int:
        """How many tokens wait, of all tenants."""
        with self._lock:
            passes = [op for q in self._queues.values() for op in q if isinstance(op, _Pass)]
        return sum(len(row.input_ids) for op in passes for row in op.rows[op.done :])

    def waiting_operations(self) -> int:
        """How many operations wait, of all tenants."""
        with self._lock:
            return sum(map(len, self._queues.values()))

    def close(self) -> None:
        """Fails what waits, and takes nothing more."""
        with self._lock:
            self._closed = True
            left = [op for queue in self._queues.values() for op in queue]
            self._queues.clear()
        for op in left:
            op.future.set_exception(LorakitError("the engine is closed"))

    def _add(self, tenant: str | int, op: _Operation) -> Future[Any]:
        with self._lock:
            if self._closed:
                raise LorakitError("the engine is closed and takes no more operations")
            self._queues.setdefault(tenant, deque()).append(op)
        self._wake()
        return op.future

    # --- on the thread that computes --------------------------------------------------------

    def tick(self) -> None:
        """Executes each tenant's next call that costs nothing, then what is next of the others.

        That is the operation of the owner that has been served the least; a pass over rows takes
        along rows of others that wait for the like.

        Nothing is raised: an operation that fails has the error in its future.
        """
        for tenant, call in self._heads(_Call).items():
            if not call.tokens:
                self._call(tenant, call)
        waiting = self._heads((_Call, _Joint, _Pass))
        ready = {t: op for t, op in waiting.items() if isinstance(op, _Pass) or op.tokens}
        if not ready:
            return
        first = self._fair.first(op.owner for op in ready.values())
        tenant, op = next(found for found in ready.items() if found[1].owner == first)
        with self._lock:
            if tenant in self._queues:  # the owner's other tenants come before it next time
                self._queues[tenant] = self._queues.pop(tenant)
        if isinstance(op, _Call):
            self._fair.charge(first, op.tokens)
            self._call(tenant, op)
        elif isinstance(op, _Joint):
            self._together(self._likes(tenant, op, ready))
        else:
            self._pass(self._group(tenant, op, ready), op.learning)

    def _call(self, tenant: str | int, call: _Call) -> None:
        def work() -> Any:
            if self.memory is not None and isinstance(tenant, str):
                self.memory.bring(tenant)
            return call.work()

        self._end(tenant, call, work)

    def _likes(self, tenant: int, op: _Joint, ready: Mapping[int, _Operation]) -> dict[int, _Joint]:
        """The items that this one is computed together with, and their places in the queue.

        They are in turn those of the owner with the fewest tokens, as long as they fit.
        """
        waiting: dict[str, deque[tuple[int, _Joint]]] = {}
        for place, other in ready.items():
            if place != tenant and isinstance(other, _Joint) and other.work == op.work:
                waiting.setdefault(other.owner, deque()).append((place, other))
        served = {owner: self._fair.served(owner) for owner in (op.owner, *waiting)}
        served[op.owner] += op.tokens
        found, longest = {tenant: op}, op.tokens
        while waiting and len(found) < op.most:
            owner = min(waiting, key=lambda owner: (served[owner], owner))
            place, other = waiting[owner].popleft()
            width = max(longest, other.tokens)
            fits = width * (len(found) + 1) <= self._pass_tokens
            if fits:
                found[place], longest = other, width
                served[owner] += other.tokens
            if not (fits and waiting[owner]):
                del waiting[owner]
        return found

    def _together(self, group: Mapping[int, _Joint]) -> None:
        for op in group.values():
            self._fair.charge(op.owner, op.tokens)
        [work] = {op.work for op in group.values()}
        try:
            results = work([op.item for op in group.values()])
        except BaseException:
            if len(group) > 1:
                for place, op in group.items():
                    self._end(place, op, lambda op=op: op.work([op.item])[0])  # type: ignore[misc]
            else:
                self._fail(group)
            return
        for (place, op), result in zip(group.items(), results, strict=True):
            self._end(place, op, lambda result=result: result)  # type: ignore[misc]

    def _heads(self, kind: type[Any] | tuple[type[Any], ...]) -> dict[Any, Any]:
        with self._lock:
            firsts = {tenant: queue[0] for tenant, queue in self._queues.items() if queue}
        return {tenant: op for tenant, op in firsts.items() if isinstance(op, kind)}

    def _end(self, tenant: str | int, op: _Operation, result: Callable[[], Any]) -> None:
        """The first operation of a tenant has ended, as `result` says."""
        with self._lock:
            queue = self._queues.get(tenant)
            if queue is None:  # closed meanwhile
                return
            queue.popleft()
            if not queue:
                del self._queues[tenant]
        try:
            found = result()
        except BaseException as error:  # whatever it is, it is the tenant's own
            op.future.set_exception(error)
        else:
            op.future.set_result(found)

    def _group(self, tenant: str, op: _Pass, ready: Mapping[str, Any]) -> dict[str, _Pass]:
        """The tenants that share the pass of this one, which is among them, and are in memory."""
        group = {tenant: op}
        if self._shares(tenant):
            for other in sorted(ready, key=lambda t: self._fair.served(ready[t].owner)):
                its = ready[other]
                if isinstance(its, _Pass) and its.learning is op.learning and self._shares(other):
                    group[other] = its
        if self.memory is None:
            return group
        chosen = self.memory.fitting(group)
        for name in chosen:
            try:
                self.memory.bring(name, chosen)
            except BaseException:  # whatever it is, it is this tenant's own
                self._fail({name: group[name]})
        return {t: group[t] for t in chosen if not group[t].future.done()}

    def _shares(self, tenant: str) -> bool:
        # Of one that rests it is not known, and does not matter: it is asked again.
        return self._resident.shares_passes(tenant)

    def _pass(self, group: Mapping[str, _Pass], learning: bool) -> None:
        counts = self._share(group)
        try:
            self._compute(group, counts, learning)
        except InputError:  # found before any gradient was added
            for tenant, op in group.items() if len(group) > 1 else ():
                self._pass({tenant: op}, learning)
            if len(group) == 1:
                self._fail(group)
        except BaseException:
            self._fail(group)

    def _share(self, group: Mapping[str, _Pass]) -> dict[str, int]:
        """How many rows of each are in the next pass: the owner with the fewest tokens is next."""
        taken = dict.fromkeys(group, 0)
        counts = dict.fromkeys(group, 0)
        served = {op.owner: self._fair.served(op.owner) for op in group.values()}
        left = set(group)
        while left:
            tenant = min(left, key=lambda t: (served[group[t].owner], taken[t], t))
            op, count = group[tenant], counts[tenant]
            if op.done + count == len(op.rows):
                left.discard(tenant)
                continue
            size = len(op.rows[op.done + count].input_ids)
            if any(counts.values()) and sum(taken.values()) + size > self._pass_tokens:
                left.discard(tenant)
                continue
            counts[tenant] += 1
            taken[tenant] += size
            served[op.owner] += size
        return counts

    def _compute(
        self, group: Mapping[str, _Pass], counts: Mapping[str, int], learning: bool
    ) -> None:
        pieces = [
            (tenant, op, op.rows[op.done : op.done + counts[tenant]])
            for tenant, op in group.items()
        ]
        losses = {id(row): op.loss for _, op, rows in pieces for row in rows}
        compute = self._resident.forward_backward if learning else self._resident.forward
        rows = [row for _, _, some in pieces for row in some]
        if rows:
            result = compute(rows, lambda logprobs, row: losses[id(row)](logprobs, row))
            self.passes += 1
            self.shared += sum(bool(count) for count in counts.values()) > 1
        begin = 0
        for tenant, op, some in pieces:
            end = begin + len(some)
            if some:
                op.logprobs += result.logprobs[begin:end]
                op.losses += result.losses[begin:end]
                size = sum(len(row.input_ids) for row in some)
                self.tokens[op.owner] = self.tokens.get(op.owner, 0) + size
                self._fair.charge(op.owner, size)
            begin = end
            if op.done == len(op.rows):
                self._end(tenant, op, lambda op=op: PassResult(op.logprobs, op.losses))  # type: ignore[misc]

    def _fail(self, group: Mapping[Any, _Operation]) -> None:
        """Ends these operations with the error that is being handled."""
        for tenant, op in group.items():
            if isinstance(op, _Pass) and op.learning and tenant in self._resident.adapters:
                self._resident.drop_gradients(tenant)
            self._end(tenant, op, _reraised)


def _reraised() -> Any:
    raise
