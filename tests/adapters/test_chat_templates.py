"""The chat template of training is kept, used by whatever asks an adapter, and compared."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoTokenizer

import lorakit
from lorakit.adapters.diff import diff
from lorakit.adapters.export.gguf_files import export_gguf_adapter
from lorakit.adapters.export.mlx import export_mlx
from lorakit.adapters.export.vllm import export_vllm
from lorakit.adapters.hub import selection
from lorakit.adapters.inspect import inspect
from lorakit.adapters.open import open_adapter
from lorakit.engine.open_engine import open_engine
from lorakit.models.template_files import digest, read_templates, write_templates
from lorakit.report.run_page import write_report
from small_runs import recipe
from tiny import CHATML, save_tiny_model

NEWER = CHATML.replace("<|im_start|>{{ m['role'] }}", "<|im_start|>{{ m['role'] | upper }}")
NAMED = {"default": CHATML, "tool_use": "tools: " + CHATML}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "base")


def train(base: Path, folder: Path, row: dict[str, str], **training: Any) -> Path:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    values = recipe(base, rows, folder / "run", max_steps=2, **training)
    values["data"]["eval"] = 0
    lorakit.train(values, quiet=True)
    return folder / "run"


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that learned conversations, with a checkpoint."""
    row = {"prompt": "Who?", "completion": "I."}
    return train(base, tmp_path_factory.mktemp("trained"), row, save_strategy="steps", save_steps=1)


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


@pytest.fixture
def newer(base: Path, tmp_path: Path) -> Path:
    """The base, behind an update of its chat template."""
    folder = Path(shutil.copytree(base, tmp_path / "newer"))
    write_templates(folder, NEWER)
    return folder


def said_by_all(adapter: Path, base: Path, place: Path) -> dict[str, str]:
    """What each way of using an adapter says of its chat template."""
    place.mkdir()
    record = adapter / "lorakit.json"
    if record.is_file():  # those that take no --base look at the recorded one
        record.write_text(json.dumps(json.loads(record.read_text()) | {"base_model": str(base)}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_adapter(adapter, base=str(base))
    engine = open_engine(str(base), {"mine": adapter})
    served = engine.notices
    engine.close()
    said: dict[str, Any] = {
        "open": [str(warning.message) for warning in caught],
        "serve": served,
        "inspect": inspect(adapter, base=str(base)).notices,
        "diff": diff(adapter, adapter).notices,
        "report": write_report(adapter, place / "page.html").notices,
        "merge": lorakit.merge(adapter, place / "merged", base=str(base)).notices,
        "vllm": export_vllm(adapter, place / "vllm", base=str(base)).notices,
        "gguf": export_gguf_adapter(adapter, place / "a.gguf", base=str(base)).notices,
        "mlx": export_mlx(adapter, place / "mlx", base=str(base)).notices,
    }
    return {
        verb: "\n".join(n for n in notices if "template" in n) for verb, notices in said.items()
    }


def test_a_run_keeps_the_template_that_it_rendered_with(trained: Path, base: Path):
    record = json.loads((trained / "lorakit.json").read_text())
    assert record["template_sha256"] == digest(CHATML)
    for folder in (trained, trained / "checkpoint-1"):
        assert (folder / "chat_template.jinja").read_text() == CHATML


def test_a_base_with_another_template_is_named_by_every_verb_and_the_own_one_is_used(
    adapter: Path, newer: Path, tmp_path: Path
):
    said = said_by_all(adapter, newer, tmp_path / "out")
    for verb, notice in said.items():
        for part in (str(adapter), str(newer), digest(CHATML)[:12], digest(NEWER)[:12]):
            assert part in notice, verb
        assert notice.count(digest(NEWER)[:12]) == 1, verb
    with pytest.warns(UserWarning, match="another chat template"):
        assert open_adapter(adapter, base=str(newer)).tokenizer.chat_template == CHATML
    out = tmp_path / "out"
    assert AutoTokenizer.from_pretrained(out / "merged").chat_template == CHATML
    for folder in ("merged", "vllm", "mlx"):
        assert (out / folder / "chat_template.jinja").read_text() == CHATML
    field = GGUFReader(out / "a.gguf").get_field("tokenizer.chat_template")
    assert field is not None
    assert field.contents() == CHATML


def test_what_differs_is_given_to_the_programs_that_take_a_template(
    adapter: Path, newer: Path, base: Path, tmp_path: Path
):
    changed = export_vllm(adapter, tmp_path / "a", base=str(newer))
    assert f"--chat-template {tmp_path}/a/chat_template.jinja" in changed.command
    assert "--chat-template" not in export_vllm(adapter, tmp_path / "b", base=str(base)).command
    written = export_gguf_adapter(adapter, tmp_path / "c.gguf", base=str(newer))
    assert written.template == str(adapter / "chat_template.jinja")
    assert export_gguf_adapter(adapter, tmp_path / "d.gguf", base=str(base)).template is None


def in_settings(folder: Path) -> None:
    """The template as older transformers kept it, among the tokenizer's settings."""
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHATML}))


def of_a_processor(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))


def with_a_newline(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(CHATML + "\n")


@pytest.mark.parametrize("form", [None, in_settings, of_a_processor, with_a_newline])
def test_the_same_template_in_whatever_form_is_no_difference(
    adapter: Path, base: Path, tmp_path: Path, form: Callable[[Path], None] | None
):
    folder = Path(shutil.copytree(base, tmp_path / "same"))
    if form is not None:
        form(folder)
    assert not any(said_by_all(adapter, folder, tmp_path / "out").values())
    assert lorakit.load_model(str(folder))[1].chat_template.strip() == CHATML


def test_an_adapter_of_an_older_record_says_what_it_cannot_use(
    adapter: Path, newer: Path, base: Path, tmp_path: Path
):
    (adapter / "chat_template.jinja").unlink()
    assert not any(said_by_all(adapter, base, tmp_path / "same").values())
    for verb, notice in said_by_all(adapter, newer, tmp_path / "out").items():
        assert digest(CHATML)[:12] in notice, verb
        assert f"put the old template into {adapter}/chat_template.jinja" in notice, verb
    assert read_templates(tmp_path / "out" / "merged") == NEWER


def test_an_edited_template_of_the_adapter_is_told_by_its_record(adapter: Path, base: Path):
    (adapter / "chat_template.jinja").write_text(NEWER)
    with pytest.warns(UserWarning, match="is not the one that it was trained with") as caught:
        assert open_adapter(adapter, base=str(base)).tokenizer.chat_template == NEWER
    assert digest(CHATML)[:12] in str(caught[0].message)


def test_adapters_that_say_nothing_of_a_template_raise_no_alarm(
    base: Path, newer: Path, tmp_path: Path
):
    model, _ = lorakit.load_model(base, "float32")
    config = lorakit.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    lorakit.get_peft_model(model, config).save_pretrained(tmp_path / "peft")
    assert not any(said_by_all(tmp_path / "peft", newer, tmp_path / "one").values())
    text_only = train(base, tmp_path, {"text": "A text."})
    assert not (text_only / "chat_template.jinja").exists()
    assert not any(said_by_all(text_only, newer, tmp_path / "two").values())


def test_a_base_without_a_template_has_none_now_either(base: Path, tmp_path: Path):
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    own = train(bare, tmp_path, {"prompt": "Who?", "completion": "I."})
    said = said_by_all(own, bare, tmp_path / "out")
    assert not any(said[verb] for verb in ("open", "serve", "inspect", "diff", "report", "merge"))
    assert "### Assistant:" in str(read_templates(tmp_path / "out" / "merged"))
    assert "--chat-template" in export_vllm(own, tmp_path / "v", base=str(bare)).command


def test_a_tokenizer_that_another_tool_saved_brings_its_template(
    adapter: Path, base: Path, tmp_path: Path
):
    (adapter / "lorakit.json").unlink()
    (adapter / "chat_template.jinja").unlink()
    AutoTokenizer.from_pretrained(base).save_pretrained(adapter, save_jinja_files=False)
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": NEWER}))
    with pytest.warns(UserWarning, match="another chat template"):
        assert open_adapter(adapter, base=str(base)).tokenizer.chat_template == NEWER
    lorakit.merge(adapter, tmp_path / "merged", base=str(base))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == NEWER


@pytest.mark.parametrize("form", ["files", "settings"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_templates_of_further_names_are_kept(
    adapter: Path, base: Path, tmp_path: Path, form: str, in_memory: bool
):
    several = Path(shutil.copytree(base, tmp_path / "several"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = NAMED
    (several / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(several, save_jinja_files=form == "files")
    assert AutoTokenizer.from_pretrained(several).chat_template == NAMED
    (adapter / "chat_template.jinja").unlink()
    (adapter / "lorakit.json").unlink()
    report = lorakit.merge(adapter, tmp_path / "m", base=str(several), in_memory=in_memory)
    assert report.passed
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == NAMED


def test_named_templates_go_with_an_adapter_wherever_it_goes(
    base: Path, newer: Path, tmp_path: Path
):
    several = Path(shutil.copytree(base, tmp_path / "several"))
    write_templates(several, NAMED)
    own = train(several, tmp_path, {"prompt": "Who?", "completion": "I."})
    assert read_templates(own) == NAMED
    assert not any(said_by_all(own, several, tmp_path / "same").values())
    assert all(said_by_all(own, newer, tmp_path / "out").values())
    out = tmp_path / "out"
    for folder in ("merged", "vllm", "mlx"):
        assert read_templates(out / folder) == NAMED
    assert "additional_chat_templates/tool_use.jinja" in selection(own).files
    lorakit_resized = tmp_path / "resized"
    from lorakit.adapters.resize import resize

    resize(own, lorakit_resized, rank=2)
    assert read_templates(lorakit_resized) == NAMED
    record = json.loads((lorakit_resized / "lorakit.json").read_text())
    assert record["template_sha256"] == digest(NAMED)


def test_merging_adapters_of_different_templates_says_so(adapter: Path, base: Path, tmp_path: Path):
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    write_templates(other, NEWER)
    (other / "lorakit.json").unlink()
    report = lorakit.merge([adapter, other], tmp_path / "m", base=str(base), verify=False)
    assert [n for n in report.notices if "different chat templates" in n and str(adapter) in n]
    assert torch.is_tensor(next(iter(lorakit.load_model(tmp_path / "m")[0].parameters())))
