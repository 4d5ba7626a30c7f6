"""Every public method of the SDK's clients is called, and answered or refused in words.

The table in docs/training-service.md is made of what is found here:
`LORAKIT_WRITE_TABLES=1 pytest tests/server/training/test_methods.py` writes it.
"""

import asyncio
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinker
from sdk_rows import datum
from tinker import types

from lorakit.errors import one_line
from served import Running
from written_tables import WrittenTable

TABLE = WrittenTable(
    Path(__file__).parents[3] / "docs" / "training-service.md",
    "<!-- table of methods: begin -->",
    "<!-- table of methods: end -->",
)
ROW = datum([11, 7, 90, 33, 52])
PROMPT = types.ModelInput.from_ints([11, 7, 90])
PARAMS = types.SamplingParams(max_tokens=2)

Call = Callable[[Any], Any]


def _sum_loss(data: Any, logprobs: Any) -> Any:
    return -sum(lp.sum() for lp in logprobs), {}


def _datum_loss(logprobs: Any, weights: Any) -> Any:
    return -(logprobs * weights).sum(), {}


SERVICE: dict[str, Call] = {
    "get_server_capabilities": lambda n: n.service.get_server_capabilities(),
    "create_lora_training_client": lambda n: n.service.create_lora_training_client("base", rank=1),
    "create_training_client_from_state": lambda n: n.service.create_training_client_from_state(
        n.path
    ),
    "create_training_client_from_state_with_optimizer": lambda n: (
        n.service.create_training_client_from_state_with_optimizer(n.path)
    ),
    "create_sampling_client": lambda n: n.service.create_sampling_client(base_model="base"),
    "create_rest_client": lambda n: n.service.create_rest_client(),
    "create_custom_loss": lambda n: n.service.create_custom_loss(
        _datum_loss, {"logprobs": 1, "weights": 1}
    ),
    "copy_weights": lambda n: n.service.copy_weights(n.path),
    "get_console_url": lambda n: n.service.get_console_url(),
    "get_telemetry": lambda n: n.service.get_telemetry(),
    "close": lambda n: n.connect().close("success"),
}
TRAINING: dict[str, Call] = {
    "get_info": lambda n: n.run.get_info(),
    "get_tokenizer": lambda n: n.run.get_tokenizer(),
    "forward": lambda n: n.run.forward([ROW], "cross_entropy"),
    "forward_backward": lambda n: n.run.forward_backward([ROW], "cross_entropy"),
    "forward_backward_custom": lambda n: n.run.forward_backward_custom([ROW], _sum_loss),
    "optim_step": lambda n: n.run.optim_step(types.AdamParams()),
    "save_state": lambda n: n.run.save_state(f"state-{next(n.numbers)}"),
    "load_state": lambda n: n.run.load_state(n.path),
    "load_state_with_optimizer": lambda n: n.run.load_state_with_optimizer(n.path),
    "save_weights_for_sampler": lambda n: n.run.save_weights_for_sampler(
        f"sampler-{next(n.numbers)}"
    ),
    "save_weights_and_get_sampling_client": lambda n: n.run.save_weights_and_get_sampling_client(),
    "create_sampling_client": lambda n: n.run.create_sampling_client(n.sampler_path),
    "save_weights_external": lambda n: n.run.save_weights_external(f"external-{next(n.numbers)}"),
    "get_console_url": lambda n: n.run.get_console_url(),
    "get_telemetry": lambda n: n.run.get_telemetry(),
}
SAMPLING: dict[str, Call] = {
    "sample": lambda n: n.sampler.sample(PROMPT, 1, PARAMS),
    "compute_logprobs": lambda n: n.sampler.compute_logprobs(PROMPT),
    "get_base_model": lambda n: n.sampler.get_base_model(),
    "get_tokenizer": lambda n: n.sampler.get_tokenizer(),
    "get_sampler_handle": lambda n: n.sampler.get_sampler_handle(),
    "from_sampler_handle": lambda n: tinker.SamplingClient.from_sampler_handle(
        n.sampler.get_sampler_handle(), api_key="tml-methods"
    ),
    "get_telemetry": lambda n: n.sampler.get_telemetry(),
}
REST: dict[str, Call] = {
    "get_server_capabilities": lambda n: n.rest.get_server_capabilities(),
    "get_training_run": lambda n: n.rest.get_training_run(n.run_id),
    "get_training_run_by_tinker_path": lambda n: n.rest.get_training_run_by_tinker_path(n.path),
    "get_weights_info_by_tinker_path": lambda n: n.rest.get_weights_info_by_tinker_path(n.path),
    "list_training_runs": lambda n: n.rest.list_training_runs(),
    "list_checkpoints": lambda n: n.rest.list_checkpoints(n.run_id),
    "list_user_checkpoints": lambda n: n.rest.list_user_checkpoints(),
    "get_external_weights_urls": lambda n: n.rest.get_external_weights_urls(n.external_path),
    "publish_checkpoint_from_tinker_path": lambda n: n.rest.publish_checkpoint_from_tinker_path(
        n.path
    ),
    "unpublish_checkpoint_from_tinker_path": lambda n: n.rest.unpublish_checkpoint_from_tinker_path(
        n.path
    ),
    "set_checkpoint_ttl_from_tinker_path": lambda n: n.rest.set_checkpoint_ttl_from_tinker_path(
        n.path, 3600
    ),
    "delete_checkpoint": lambda n: n.rest.delete_checkpoint(n.run_id, _saved(n)[1]),
    "delete_checkpoint_from_tinker_path": lambda n: n.rest.delete_checkpoint_from_tinker_path(
        _saved(n)[0]
    ),
    "get_session": lambda n: n.rest.get_session(n.run_id.split(":")[0]),
    "list_sessions": lambda n: n.rest.list_sessions(),
    "search_sessions": lambda n: n.rest.search_sessions(
        types.SessionSearchRequest(owner=types.AccessibleSearchOwner())
    ),
    "assign_session_project": lambda n: n.rest.assign_session_project(
        n.run_id.split(":")[0], "project"
    ),
    "export_session_trace": lambda n: n.rest.export_session_trace(n.run_id.split(":")[0]),
    "get_sampler": lambda n: n.rest.get_sampler(n.sampler_id),
    "copy_weights": lambda n: n.rest.copy_weights(n.path, "project"),
    "get_audit_log": lambda n: n.rest.get_audit_log(),
    "get_billing_usage": lambda n: n.rest.get_billing_usage("2026-01-01", "2026-01-02"),
    "get_current_checkpoint_storage_usage": lambda n: n.rest.get_current_checkpoint_storage_usage(),
    "whoami": lambda n: n.rest.whoami(),
    "get_telemetry": lambda n: n.rest.get_telemetry(),
}
METHODS = {
    tinker.ServiceClient: SERVICE,
    tinker.TrainingClient: TRAINING,
    tinker.SamplingClient: SAMPLING,
    tinker.RestClient: REST,
}
# Not for users: SamplingClient's constructor for other clients, and a callback.
_INSIDE = {"SamplingClient": {"create", "on_queue_state_change"}}


def _saved(names: Any) -> tuple[str, str]:
    path = names.run.save_state(f"state-{next(names.numbers)}").result().path
    return path, path.split("/", 3)[3]


def public(kind: type) -> set[str]:
    """The names of a client's methods; those ending in `_async` are their likes for coroutines."""
    found = {n for n, v in inspect.getmembers(kind) if callable(v) and not n.startswith("_")}
    return {n for n in found if n.removesuffix("_async") not in found - {n}} - _INSIDE.get(
        kind.__name__, set()
    )


def outcome(call: Call, names: Any) -> str:
    """`yes`, or what the client is told."""
    try:
        found = call(names)
        if inspect.iscoroutine(found):
            found = asyncio.run(found)
        if hasattr(found, "result"):
            found.result(30)
    except Exception as error:
        body = getattr(error, "body", None)
        told = body.get("error", body) if isinstance(body, dict) else None
        message = told.get("message") if isinstance(told, dict) else told
        return f"no: {one_line(str(message or error))}"
    return "yes"


@pytest.fixture(scope="module")
def names(connect: Any, service: Running) -> Any:
    from itertools import count

    client = connect("tml-methods")
    run = client.create_lora_training_client("base", rank=1, seed=1).result()
    sampler = run.save_weights_and_get_sampling_client().result()
    return SimpleNamespace(
        service=client,
        connect=lambda: connect("tml-methods"),
        run=run,
        run_id=run.get_info().model_id,
        path=run.save_state("kept").result().path,
        sampler_path=run.save_weights_for_sampler("sampled").result().path,
        external_path=run.save_weights_external("exported").result().path,
        sampler=sampler,
        sampler_id=sampler._sampling_session_id,
        rest=tinker.RestClient(base_url=service.url, api_key="tml-methods"),
        numbers=count(),
    )


def test_the_table_of_methods_is_what_each_of_them_does(
    names: Any, service: Running, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TINKER_BASE_URL", service.url)
    monkeypatch.setenv("TINKER_PROJECT_ID", "project")
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, calls in METHODS.items():
            assert calls.keys() == public(kind), kind
            for name, call in calls.items():
                rows.append(f"| `{kind.__name__}.{name}` | {outcome(call, names)} |")
    TABLE.is_made_of(["| method | here |", "| --- | --- |", *rows])
