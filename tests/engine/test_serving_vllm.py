"""vLLM is started with what it can serve, as printed, and everything else is refused with advice.

vLLM is not installed: a recording program of that name stands on the PATH in its place.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.adapters.export.vllm_base import slot_bytes
from lorakit.adapters.manifest import Manifest, write_manifest
from lorakit.errors import InputError, LorakitError
from lorakit.server.vllm import VllmOptions, plan, serve
from plain_adapters import KINDS, updates
from random_adapters import change, make_adapter
from tiny import CHATML, save_tiny_model

Adapters = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Adapters:
    """Makes an adapter on `base` in a folder of that name."""

    def make(name: str = "orders", **config: Any) -> Path:
        return make_adapter(base, tmp_path / name, **config)

    return make


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., VllmOptions]:
    def make(*folders: Path, **values: Any) -> VllmOptions:
        adapters = {folder.name: folder for folder in folders}
        return VllmOptions(adapters=adapters, workspace=tmp_path / "copies", **values)

    return make


def parsed(command: tuple[str, ...] | list[str]) -> argparse.Namespace:
    """The command as argparse reads it, with the options declared as vLLM declares them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verb")
    parser.add_argument("model")
    parser.add_argument("--enable-lora", action="store_true")
    for option in ("--max-loras", "--max-lora-rank", "--max-cpu-loras", "--port"):
        parser.add_argument(option, type=int)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    for option in ("--host", "--generation-config", "--dtype", "--chat-template", "--revision"):
        parser.add_argument(option)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--lora-modules", nargs="+", type=json.loads, default=[])
    assert command[0] == "vllm"
    return parser.parse_args(command[1:])


def test_the_command_names_everything_and_takes_adapters_from_where_they_are(
    base: Path, adapter: Adapters, options: Callable[..., VllmOptions], tmp_path: Path
):
    orders, songs = adapter(), adapter("songs", seed=1, r=17, use_rslora=True)
    planned = plan(options(orders, songs, context_length=256, dtype="bfloat16", port=8123))
    modules = [
        json.dumps({"name": f.name, "path": str(f), "base_model_name": str(base)})
        for f in (orders, songs)
    ]
    assert list(planned.command) == [
        *("vllm", "serve", str(base), f"--served-model-name={base}"),
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "32", "--max-cpu-loras", "2"),
        *("--generation-config", "vllm", "--dtype", "bfloat16", "--max-model-len", "256"),
        *("--host", "127.0.0.1", "--port", "8123", "--lora-modules", *modules),
    ]
    assert planned.environment == {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "False",
    }
    # Every linear layer and the head with its in + out columns, 2 slots, rank 32, 2 bytes each.
    size = 2 * 32 * 2 * (2 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 48)) + 32 + 259)
    assert planned.notices == (f"2 slots of rank 32 take about {size / 1e6:,.0f} MB of the GPU",)
    assert not (tmp_path / "copies").exists()


@pytest.mark.parametrize("kind", ["patterns", "pissa"])
def test_what_vllm_would_misread_is_served_from_a_copy_with_the_same_update(
    kind: str, base: Path, adapter: Adapters, options: Callable[..., VllmOptions], tmp_path: Path
):
    odd, plain = adapter("odd", **KINDS[kind]), adapter("plain")
    planned = plan(options(odd, plain))
    odd_module, plain_module = parsed(planned.command).lora_modules
    assert plain_module["path"] == str(plain)
    copy = Path(odd_module["path"])
    assert copy.parent == tmp_path / "copies"
    config = json.loads((copy / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["r"] <= parsed(planned.command).max_lora_rank
    before, after = updates(odd), updates(copy)
    assert before.keys() == after.keys()
    for path in before:
        torch.testing.assert_close(after[path], before[path], rtol=1e-5, atol=1e-6)
    why = {"patterns": "rank_pattern", "pissa": "starts from a part of the weight"}[kind]
    (notice,) = [n for n in planned.notices if "copy" in n]
    assert notice.startswith("odd is served from a copy")
    assert why in notice


def test_a_copy_is_written_once_and_anew_for_other_values(
    adapter: Adapters, options: Callable[..., VllmOptions], tmp_path: Path
):
    odd = adapter("odd", alpha_pattern={"q_proj": 5})
    first = plan(options(odd))
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "copies").rglob("*")}
    assert plan(options(odd)) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "copies").rglob("*")} == written
    weights = odd / "adapter_model.safetensors"
    save_file({k: 2 * t for k, t in load_file(weights).items()}, weights)
    second = plan(options(odd))
    (module,) = parsed(second.command).lora_modules
    assert module["path"] != parsed(first.command).lora_modules[0]["path"]
    before, after = updates(odd), updates(Path(module["path"]))
    for path in before:
        torch.testing.assert_close(after[path], before[path], rtol=1e-5, atol=1e-6)


def test_rslora_and_an_odd_rank_need_no_copy_as_vllm_reads_them(
    base: Path, adapter: Adapters, options: Callable[..., VllmOptions]
):
    folder = adapter(r=5, lora_alpha=7, use_rslora=True)
    (module,) = parsed(plan(options(folder)).command).lora_modules
    assert module["path"] == str(folder)
    # What vLLM computes: alpha / sqrt(r) and the file's own factors.
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    update = 7 / 5**0.5 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    merged = change(base, folder)["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(update, merged, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, ["DoRA", "lorakit merge"]),
        ({"modules_to_save": ["lm_head"]}, ["modules trained whole", "lorakit merge"]),
        ({"bias": "all"}, ["trained biases", "lorakit merge"]),
        ({"trainable_token_indices": [1, 2]}, ["trained tokens", "lorakit merge"]),
        ({"r": 513, "target_modules": ["q_proj"]}, ["rank 513", "at most 512", "lorakit merge"]),
        ({"task_type": "SEQ_2_SEQ_LM"}, ["for SEQ_2_SEQ_LM", "causal", "leave it out"]),
    ],
)
def test_an_adapter_that_vllm_cannot_hold_is_refused_by_name(
    config: dict[str, Any],
    words: list[str],
    adapter: Adapters,
    options: Callable[..., VllmOptions],
    tmp_path: Path,
):
    good, bad = adapter("good"), adapter("bad", **config)
    with pytest.raises(InputError) as error:
        plan(options(good, bad))
    for word in (str(bad), *words):
        assert word in str(error.value)
    assert not (tmp_path / "copies").exists()


def test_an_adapter_of_another_base_is_refused_where_vllm_would_answer_as_the_base(
    base: Path, adapter: Adapters, options: Callable[..., VllmOptions], tmp_path: Path
):
    wide = save_tiny_model(tmp_path / "wide", hidden_size=64)
    of_wide = make_adapter(wide, tmp_path / "of-wide")
    with pytest.raises(
        InputError, match=r"(?s)orders is for .*, and a server has one base.*--model"
    ):
        plan(options(adapter(), of_wide))
    with pytest.raises(InputError, match=r"has 64 × 48 for .*, and that of .*base is 32 × 48"):
        plan(options(of_wide, model=str(base)))
    renamed = adapter("renamed")
    weights = renamed / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k.replace(".layers.1.", ".layers.7."): t for k, t in tensors.items()}, weights)
    with pytest.raises(InputError, match=r"adapts model\.layers\.7\..*which .* does not have"):
        plan(options(renamed))


def test_a_base_that_moved_is_taken_from_model_and_said(
    base: Path, adapter: Adapters, options: Callable[..., VllmOptions], tmp_path: Path
):
    folder = adapter()
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    planned = plan(options(folder, model=str(moved)))
    assert parsed(planned.command).model == str(moved)
    assert any(f"orders was trained on {base}" in notice for notice in planned.notices)
    # The same folder by another name is the same base, and nothing to talk about.
    (tmp_path / "link").symlink_to(base)
    linked = plan(options(folder, model=str(tmp_path / "link")))
    assert not any("was trained" in notice for notice in linked.notices)


def test_a_base_with_other_weights_than_recorded_is_said(
    base: Path, adapter: Adapters, options: Callable[..., VllmOptions]
):
    folder = adapter()
    record = {
        "made_by": "resize",
        "sources": [],
        "base_model": str(base),
        "base_fingerprint": "0" * 64,
    }
    (folder / "lorakit.json").write_text(json.dumps(record))
    notices = plan(options(folder)).notices
    assert any(f"other weights than those of {base}" in notice for notice in notices)
    from lorakit.models.fingerprint import fingerprint
    from lorakit.models.load import load_model

    record["base_fingerprint"] = fingerprint(load_model(base, "float32")[0])
    (folder / "lorakit.json").write_text(json.dumps(record))
    assert not any("other weights" in notice for notice in plan(options(folder)).notices)


def test_an_adapter_trained_beside_a_quantised_base_is_said(
    base: Path, adapter: Adapters, options: Callable[..., VllmOptions]
):
    folder = adapter()
    manifest = Manifest(
        base_model=str(base),
        recipe={"quantization": "nf4"},
        data=[],
        steps=1,
        train_seconds=1,
        train_tokens=1,
        supervised_tokens=1,
        tokens_per_second=1,
        peak_memory_mb=1,
        eval_loss=None,
        base_eval_loss=None,
        versions={},
        seed=0,
    )
    write_manifest(folder, manifest)
    said = "orders was trained beside a base quantised to nf4"
    assert any(notice.startswith(said) for notice in plan(options(folder)).notices)
    write_manifest(folder, manifest.model_copy(update={"recipe": {}}))
    assert not any("quantised" in notice for notice in plan(options(folder)).notices)


def test_a_base_that_vllm_does_not_adapt_is_refused(
    adapter: Adapters, options: Callable[..., VllmOptions], base: Path, tmp_path: Path
):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"is a GGUF file.*give --model the folder or hub id"):
        plan(options(adapter(), model=str(gguf)))
    other = Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"GPT2LMHeadModel\) without adapters only.*lorakit"):
        plan(options(adapter("second"), model=str(other)))
    # Without an adapter there is nothing that vLLM could not do.
    assert "--enable-lora" not in plan(options(model=str(other))).command
    (other / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        plan(options(model=str(other)))


def test_a_hub_base_that_is_not_here_is_named_and_nothing_fetched(
    adapter: Adapters,
    options: Callable[..., VllmOptions],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    folder = adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "ada/none-such", "revision": "v2"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    planned = plan(options(folder))
    found = parsed(planned.command)
    assert (found.model, found.revision) == ("ada/none-such", "v2")
    assert found.served_model_name == ["ada/none-such"]
    assert "ada/none-such is not on this machine: nothing of it was checked" in planned.notices


def test_a_hub_base_in_the_cache_is_checked_and_named_by_its_id(
    base: Path,
    adapter: Adapters,
    options: Callable[..., VllmOptions],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--ada--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copy(base / "config.json", snapshot)
    folder = adapter()
    record = {"made_by": "resize", "sources": [], "base_model": "ada/tiny"}
    (folder / "lorakit.json").write_text(json.dumps(record | {"base_fingerprint": "0" * 64}))
    planned = plan(options(folder, context_length=512))
    assert parsed(planned.command).model == "ada/tiny"
    uncached = plan(options(folder, enable_prefix_caching=False))
    assert parsed(uncached.command).enable_prefix_caching is False
    assert not any("weights" in notice for notice in planned.notices)  # they are not here
    shutil.copytree(base, snapshot, dirs_exist_ok=True)
    assert any("other weights than those of ada/tiny" in n for n in plan(options(folder)).notices)
    with pytest.raises(InputError, match="ada/tiny has positions for 512 tokens"):
        plan(options(folder, context_length=513))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"host": "0.0.0.0"}, "can be reached from other machines: give --api-key"),
        ({"host": "server.example"}, "can be reached from other machines: give --api-key"),
        ({"host": "-x"}, "is not an address"),
        ({"api_key": ""}, "--api-key must be printable ASCII"),
        ({"dtype": "float32"}, "not in float32: leave --dtype out"),
        ({"context_length": 513}, "positions for 512 tokens: give --context-length 512 or less"),
        ({"adapter_root": Path("a")}, "needs both --adapter-root and --admin-key"),
        ({"admin_key": "k"}, "needs both --adapter-root and --admin-key"),
        ({"adapter_root": Path("a"), "admin_key": "k"}, "give --api-key beside --adapter-root"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    values: dict[str, Any], words: str, base: Path, options: Callable[..., VllmOptions]
):
    with pytest.raises(InputError) as error:
        plan(options(model=str(base), **values))
    assert words in str(error.value)


def test_nothing_and_two_things_of_one_name_are_refused(
    base: Path, adapter: Adapters, options: Callable[..., VllmOptions]
):
    with pytest.raises(InputError, match="nothing to serve: give adapters, or --model"):
        plan(options())
    with pytest.raises(InputError, match="both called"):
        plan(VllmOptions(adapters={str(base): adapter()}))
    with pytest.raises(InputError, match="NAME=PATH"):
        plan(VllmOptions(adapters={"": adapter("second")}))


def test_a_slot_has_room_for_every_linear_layer_and_expert():
    from torch import nn

    model = nn.Sequential(nn.Linear(3, 5), nn.Embedding(7, 3), nn.LayerNorm(5))
    assert slot_bytes(model, 4) == 2 * 4 * (3 + 5)
    model.experts = nn.Parameter(torch.zeros(6, 10, 20))
    assert slot_bytes(model, 4) == 2 * 4 * (3 + 5 + 6 * (10 + 20))


def test_an_adapted_head_is_said_as_not_every_model_of_vllm_takes_it(
    adapter: Adapters, options: Callable[..., VllmOptions]
):
    planned = plan(options(adapter(target_modules=["q_proj", "lm_head", "embed_tokens"])))
    assert any("adapts embed_tokens, lm_head, which vLLM takes" in n for n in planned.notices)


def test_many_adapters_share_sixteen_slots(adapter: Adapters, options: Callable[..., VllmOptions]):
    folder = adapter()
    planned = plan(VllmOptions(adapters={f"a{i}": folder for i in range(20)}))
    found = parsed(planned.command)
    assert (found.max_loras, found.max_cpu_loras, len(found.lora_modules)) == (16, 20, 20)
    assert any("16 of the 20 adapters: requests for others wait" in n for n in planned.notices)


def test_loading_later_is_allowed_with_room_for_it_and_a_warning(
    base: Path, options: Callable[..., VllmOptions], tmp_path: Path
):
    planned = plan(
        options(model=str(base), adapter_root=tmp_path, admin_key="boss", api_key="secret")
    )
    assert planned.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    found = parsed(planned.command)
    assert found.enable_lora
    assert (found.max_loras, found.max_cpu_loras, found.max_lora_rank) == (8, 8, 16)
    assert any("neither --admin-key nor --adapter-root" in n for n in planned.notices)
    assert any("ranks up to 16" in n for n in planned.notices)
    assert "boss" not in str(planned)


def test_the_template_that_all_adapters_share_is_given_and_two_are_refused(
    base: Path, adapter: Adapters, options: Callable[..., VllmOptions]
):
    one, two = adapter("one"), adapter("two")
    (one / "chat_template.jinja").write_text(CHATML + "\n")
    same = plan(options(one, two))  # the base's own, but for a line's end
    assert "--chat-template" not in same.command
    for folder in (one, two):
        (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    planned = plan(options(one, two))
    assert parsed(planned.command).chat_template == str(one / "chat_template.jinja")
    assert any("the chat template is that of one" in notice for notice in planned.notices)
    (two / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match=r"one and two have different chat templates.*one for all"):
        plan(options(one, two))


# What is started


PROGRAM = """#!{python}
import json, os, sys
record = {{"argv": sys.argv, "environment": dict(os.environ), "pid": os.getpid()}}
json.dump(record, open(os.environ["RECORD"], "w"))
sys.exit(7)
"""


def become(options: VllmOptions, folder: Path, environment: dict[str, str]) -> tuple[int, Any]:
    """Starts vLLM as `serve` does, in the place of a process of its own in `folder`.

    Returns: the process' number, and it when it has ended.
    """
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    if not (child := os.fork()):  # which has everything imported
        try:
            os.chdir(folder)
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
                name = ("stdout", "stderr")[number - 1]
                setattr(sys, name, os.fdopen(number, "w", closefd=False))
            os.environ.clear()
            os.environ.update(environment)
            serve(options)
        finally:
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return child, subprocess.CompletedProcess("", code, out.read_text(), err.read_text())


HOSTILE = (
    "two words",
    "a=b,c",
    "--port",
    "-x",
    "$(touch hacked)",
    'it\'s; `x` "y" & *',
    "new\nline",
    "ü",
)


@pytest.fixture
def surroundings(tmp_path: Path) -> dict[str, str]:
    """Variables with a program `vllm` on the PATH that records how it was started."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "RECORD": str(tmp_path / "record.json")}


def test_what_is_started_is_what_is_printed_even_with_hostile_names(
    base: Path,
    adapter: Adapters,
    surroundings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    hostile = Path(shutil.copytree(base, tmp_path / "-b=$(touch hacked), 'x'"))
    folder = adapter("an adapter's = $HOME, folder", alpha_pattern={"q_proj": 5})
    monkeypatch.chdir(tmp_path)
    options = VllmOptions(
        model=str(hostile.relative_to(tmp_path)),
        adapters=dict.fromkeys(HOSTILE, folder),
        api_key="s3cret$key'",
        workspace=tmp_path / "my $(copies)",
    )
    serve(options, dry_run=True)
    dry = capsys.readouterr()
    assert "s3cret" not in dry.out + dry.err
    record = tmp_path / "record.json"
    assert not record.exists()

    number, ended = become(options, tmp_path, surroundings)
    assert ended.returncode == 7, ended.stderr  # the program's own
    started = json.loads(record.read_text())
    assert started["pid"] == number
    assert (ended.stdout, ended.stderr) == ("", dry.out)
    assert "s3cret" not in " ".join(started["argv"])
    assert started["environment"]["VLLM_API_KEY"] == "s3cret$key'"

    record.unlink()
    line = subprocess.run(
        ["sh", "-c", dry.out],
        capture_output=True,
        env={**surroundings, "VLLM_API_KEY": "s3cret$key'"},
        text=True,
    )
    assert line.returncode == 7, line.stderr
    by_hand = json.loads(record.read_text())
    assert by_hand["argv"] == started["argv"]
    for name in ("VLLM_API_KEY", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_NO_USAGE_STATS"):
        assert by_hand["environment"][name] == started["environment"][name]
    assert not (tmp_path / "hacked").exists()

    found = parsed(["vllm", *started["argv"][1:]])
    assert found.model == str(hostile)
    assert found.served_model_name == ["-b=$(touch hacked), 'x'"]
    assert [module["name"] for module in found.lora_modules] == list(HOSTILE)
    (path,) = {module["path"] for module in found.lora_modules}
    assert Path(path).parent == tmp_path / "my $(copies)"
    assert (Path(path) / "adapter_model.safetensors").is_file()
    assert {module["base_model_name"] for module in found.lora_modules} == {hostile.name}


def test_the_printed_line_stops_without_the_key(
    base: Path, surroundings: dict[str, str], tmp_path: Path
):
    line = plan(VllmOptions(model=str(base), api_key="secret")).shown()
    surroundings.pop("VLLM_API_KEY", None)
    result = subprocess.run(["sh", "-c", line], env=surroundings, capture_output=True, text=True)
    assert result.returncode != 0
    assert "VLLM_API_KEY" in result.stderr
    assert not (tmp_path / "record.json").exists()


def test_without_vllm_on_the_path_it_says_what_to_install_and_dry_run_still_prints(
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"pip install vllm.*--dry-run"):
        serve(VllmOptions(model=str(base)))
    serve(VllmOptions(model=str(base)), dry_run=True)
    *notices, command = capsys.readouterr().out.splitlines()
    assert all(notice.startswith("# ") for notice in notices)
    assert " vllm serve " in command


def test_a_program_that_the_system_cannot_start_is_one_line(
    base: Path, surroundings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "bin" / "vllm").write_bytes(b"\0not a program")
    monkeypatch.setenv("PATH", surroundings["PATH"])
    with pytest.raises(LorakitError, match="vllm cannot be started: Exec format error"):
        serve(VllmOptions(model=str(base)))


def test_a_key_that_is_set_already_is_said(base: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_API_KEY", "elsewhere")
    planned = plan(VllmOptions(model=str(base)))
    assert "VLLM_API_KEY is set here, so vLLM will ask for that key" in planned.notices
    assert "elsewhere" not in str(planned)
