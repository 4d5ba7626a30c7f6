"""What the training service counts, for Prometheus and for the page at `/training`.

Keys are shown by their name, or by the beginning of their digest. A caller sees the counts of its
own key, and of all others as the admin.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lorakit.server.keys import Caller
from lorakit.server.training.checkpoints import KINDS, Run
from lorakit.server.training.history import Point, read_history
from lorakit.server.training.service import TrainingService

_SHOWN_RUNS = 100  # besides those that are live
_LABELS = 1000  # keys that are told apart


@dataclass
class TrainingFigures:
    """Figures of a service.

    Args:
        everyone: whether every caller sees those of all keys.
    """

    service: TrainingService
    everyone: bool

    def page(self, caller: Caller) -> bytes:
        """Those that a caller sees, as Prometheus reads them."""
        found = list(self._metrics(caller))

        class Once:
            def collect(self) -> Iterable[Metric]:
                return found

        return bytes(generate_latest(Once()))

    def _metrics(self, caller: Caller) -> Iterator[Metric]:
        service, quotas = self.service, self.service.quotas
        queue, memory = service.engine.training, service.memory
        counters: dict[str, tuple[str, Mapping[str, int]]] = {
            "trained_tokens": ("Tokens of rows trained on.", quotas.trained),
            "sampled_tokens": ("Tokens sampled.", quotas.sampled),
        }
        for name, (meaning, counts) in counters.items():
            yield self._by_key(CounterMetricFamily, name, meaning, counts, caller)
        states: dict[str, tuple[str, Mapping[str, int]]] = {
            "tokens_in_flight": ("Tokens of pending requests.", quotas.tokens),
            "checkpoint_bytes": ("Bytes of saved weights.", quotas.disk.used()),
        }
        for name, (meaning, counts) in states.items():
            yield self._by_key(GaugeMetricFamily, name, meaning, counts, caller)
        yield CounterMetricFamily("lorakit_training_passes", "Passes.", queue.passes)
        yield CounterMetricFamily(
            "lorakit_training_passes_shared", "Passes with rows of several models.", queue.shared
        )
        gauges = {
            "queue_tokens": ("Tokens of rows in the queue.", queue.waiting_tokens()),
            "queue_operations": ("Operations in the queue.", queue.waiting_operations()),
            "models": ("Live models.", len(service.runs(Caller("", is_admin=True)))),
            "adapters_in_memory": ("Adapters in memory.", memory.in_memory),
            "adapters_on_disk": ("Idle adapters on disk.", memory.on_disk),
            "adapter_bytes": ("Memory of adapters, with optimizer state.", memory.bytes),
        }
        for name, (meaning, value) in gauges.items():
            yield GaugeMetricFamily(f"lorakit_training_{name}", meaning, value)

    def _by_key(
        self, kind: Any, name: str, meaning: str, counts: Mapping[str, int], caller: Caller
    ) -> Metric:
        family: Any = kind(f"lorakit_{name}", meaning, labels=["key"])
        for owner, count in list(dict(counts).items())[:_LABELS]:
            if self.everyone or caller.sees(owner):
                family.add_metric([self.service.label(owner)], count)
        found: Metric = family
        return found

    def state(self, caller: Caller) -> dict[str, Any]:
        """Who trains what, of what a caller sees, for the page."""
        service = self.service
        queue, memory = service.engine.training, service.memory
        live = {run.record.run_id: run for run in service.runs(caller)}
        runs = service.store.runs(caller)
        shown = [run for run in runs if run.run_id in live]
        shown += [run for run in runs if run.run_id not in live][:_SHOWN_RUNS]
        return {
            "key": service.label(caller.owner),
            "admin": caller.is_admin,
            "base_model": service.engine.model_name,
            "passes": queue.passes,
            "passes_shared": queue.shared,
            "queue_tokens": queue.waiting_tokens(),
            "adapters_in_memory": memory.in_memory,
            "adapters_on_disk": memory.on_disk,
            "trained_tokens": _seen(service.quotas.trained, caller),
            "sampled_tokens": _seen(service.quotas.sampled, caller),
            "runs": [self._run(run, live.get(run.run_id)) for run in shown],
        }

    def _run(self, run: Run, live: Any) -> dict[str, Any]:
        store = self.service.store
        points = read_history(store.history(run.run_id))
        last: Point | None = points[-1] if points else None
        parts = [part for part in ("attn", "mlp", "unembed") if run.lora[f"train_{part}"]]
        return {
            "id": run.run_id,
            "key": self.service.label(run.owner),
            "live": live is not None,
            "idle_seconds": None if live is None else round(time.monotonic() - live.used),
            "rank": run.lora["rank"],
            "parts": parts,
            "created": run.created,
            "metadata": run.user_metadata or {},
            "last": None if last is None else asdict(last),
            "curve": [[point.step, point.loss] for point in points if point.loss is not None],
            "checkpoints": [
                {
                    "path": checkpoint.path,
                    "kind": KINDS[checkpoint.kind],
                    "created": checkpoint.created,
                    "size": store.size(checkpoint),
                    "public": checkpoint.public,
                    "expires": checkpoint.expires,
                }
                for checkpoint in store.checkpoints(run.run_id)
            ],
        }


def _seen(counts: Mapping[str, int], caller: Caller) -> int:
    return sum(count for owner, count in dict(counts).items() if caller.sees(owner))
