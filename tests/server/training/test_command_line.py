"""The SDK's own command line `tinker`, through its entry point, against the service."""

import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import tinker
from click.testing import CliRunner
from safetensors.torch import load_file
from sdk_rows import datum, with_peft
from tinker import types
from tinker.cli.exceptions import TinkerCliError

from served import Running

KEY = "tml-typing"
Tinker = Callable[..., str]


@pytest.fixture
def tinker_cli(
    service: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., str]:
    """Runs `tinker` with arguments; what it prints."""
    [entry] = entry_points(group="console_scripts", name="tinker")
    assert entry.value.startswith("tinker.cli")
    from tinker.cli.__main__ import main_cli

    monkeypatch.setenv("TINKER_BASE_URL", service.url)
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(main_cli, arguments, catch_exceptions=True)
        if isinstance(done.exception, TinkerCliError):
            raise done.exception
        assert done.exit_code == 0, (done.output, done.exception)
        return str(done.stdout)

    return run


@pytest.fixture
def run(connect: Callable[..., Any]) -> Any:
    run = (
        connect(KEY).create_lora_training_client("base", rank=2, user_metadata={"n": "x"}).result()
    )
    run.forward_backward([datum([1, 2, 3, 4])], "cross_entropy").result()
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return run


def test_runs_and_checkpoints_are_listed_shown_published_kept_for_a_time_and_deleted(
    tinker_cli: Tinker, run: Any
):
    model_id = run.get_info().model_id
    path = run.save_state("kept").result().path
    sampled = run.save_weights_for_sampler("sampled").result().path

    def listed(*arguments: str) -> list[dict[str, Any]]:
        found = json.loads(tinker_cli("-f", "json", "checkpoint", "list", *arguments))
        return list(found["checkpoints"])

    runs = json.loads(tinker_cli("-f", "json", "run", "list"))["runs"]
    assert model_id in [one["training_run_id"] for one in runs]
    assert "x" in tinker_cli("run", "info", model_id)
    assert "Rank 2" in tinker_cli("run", "list", "--columns", "id,lora", "--limit", "0")
    assert {one["tinker_path"] for one in listed("--run-id", model_id)} == {path, sampled}
    assert path in {one["tinker_path"] for one in listed("--limit", "0")}
    assert "Never" in tinker_cli("checkpoint", "info", path)
    tinker_cli("checkpoint", "set-ttl", path, "--ttl", "7200")
    tinker_cli("checkpoint", "publish", path)
    [one] = [one for one in listed("--run-id", model_id) if one["tinker_path"] == path]
    assert one["public"]
    assert one["expires_at"]
    tinker_cli("checkpoint", "unpublish", path)
    tinker_cli("checkpoint", "set-ttl", path, "--remove")
    [one] = [one for one in listed("--run-id", model_id) if one["tinker_path"] == path]
    assert not one["public"]
    assert one["expires_at"] is None
    tinker_cli("checkpoint", "delete", path, "--yes")
    tinker_cli("checkpoint", "delete", "--run-id", model_id, "--yes")
    assert listed("--run-id", model_id) == []
    assert "base" in tinker_cli("model", "list")
    with pytest.raises(TinkerCliError, match="not found"):
        tinker_cli("run", "info", f"{model_id}x")


def test_a_checkpoint_is_downloaded_as_a_peft_folder(
    tinker_cli: Tinker, run: Any, base: Path, tmp_path: Path, state: Path
):
    path = run.save_state("to-load").result().path
    tinker_cli("checkpoint", "download", path, "--output", str(tmp_path))
    [folder] = tmp_path.glob("*_weights_to-load")
    saved = next(state.glob(f"runs/{run.get_info().model_id.replace(':', '+')}/weights/to-load"))
    own, other = (load_file(f / "adapter_model.safetensors") for f in (saved, folder))
    assert own.keys() == other.keys()
    assert all((own[key] == other[key]).all() for key in own)
    assert not (folder / "optimizer.safetensors").exists()
    assert with_peft(base, folder).peft_config["default"].r == 2
    # What the download was made of is gone again.
    assert "external" not in tinker_cli("checkpoint", "list", "--limit", "0")


def test_a_download_can_be_encrypted_to_keys(service: Running, run: Any, tmp_path: Path):
    pyrage = pytest.importorskip("pyrage")
    identity = pyrage.x25519.Identity.generate()
    recipients = [str(identity.to_public())]
    saved = run.save_weights_external("secret", age_encryption_recipients=recipients)
    rest = tinker.RestClient(base_url=service.url, api_key=KEY)
    urls = rest.get_external_weights_urls(saved.result().path).result().urls
    assert {name.endswith(".age") for name in urls} == {True}
    content = service.http.get(urls["adapter_config.json.age"]).content
    assert json.loads(pyrage.decrypt(content, [identity]))["r"] == 2
    with pytest.raises(tinker.RequestFailedError, match="neither an age1"):
        run.save_weights_external("wrong", age_encryption_recipients=["age1no"]).result()
    assert run.save_weights_external("plain").result().path.endswith("/plain")


def test_a_download_needs_the_signature_of_its_own_file(service: Running, run: Any):
    path = run.save_weights_external("signed").result().path
    urls = (
        tinker.RestClient(base_url=service.url, api_key=KEY)
        .get_external_weights_urls(path)
        .result()
    )
    url = urls.urls["adapter_config.json"]
    assert service.http.get(url).json()["r"] == 2  # without a key
    for wrong in (
        url.replace("adapter_config.json", "adapter_model.safetensors"),
        url.replace("signature=", "signature=0"),
        url.replace("expires=", "expires=9"),
        url.partition("?")[0],
        url.replace("adapter_config.json", "..%2Frun.json"),
    ):
        assert service.http.get(wrong).status_code in (403, 404)
