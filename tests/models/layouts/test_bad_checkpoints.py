"""Original checkpoints that cannot be right are refused in one line that says what to do."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from chatglm_folders import config, write_original
from lorakit.errors import InputError

QKV = "transformer.encoder.layers.0.self_attention.query_key_value.weight"


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        lorakit.load_model(str(folder))
    line = str(error.value)
    assert "\n" not in line
    assert str(folder) in line
    return line


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number above 0, not 0"),
        ({"num_layers": "2"}, "num_layers must be a whole number above 0, not '2'"),
        ({"num_attention_heads": True}, "must be a whole number above 0, not True"),
        ({"multi_query_group_num": 3}, "num_attention_heads 4 is not a multiple of 3"),
        ({"kv_channels": 6}, "kv_channels 6 is not a multiple of 4"),
        ({"layernorm_epsilon": None}, "layernorm_epsilon must be a number above 0, not None"),
        ({"rope_ratio": -1}, "rope_ratio must be a number above 0, not -1"),
        ({"rmsnorm": False}, "rmsnorm False, which transformers' GLM cannot do"),
        ({"multi_query_attention": False}, "multi_query_attention False"),
        ({"add_bias_linear": True}, "add_bias_linear True"),
        ({"quantization_bit": 4}, "quantised by its own code (quantization_bit 4)"),
        ({"pre_seq_len": 128}, "give the model without P-tuning"),
        ({"position_encoding_2d": True}, "the first ChatGLM-6B, another architecture"),
        ({"vision_config": {}}, "GLM-4V"),
    ],
)
def test_a_configuration_that_glm_cannot_follow(tmp_path: Path, changed: Any, words: str):
    folder = write_original(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config(**changed)))
    assert words in refusal(folder)


def test_a_configuration_that_says_too_little(tmp_path: Path):
    folder = write_original(tmp_path / "model")
    values = config()
    del values["kv_channels"], values["num_layers"]
    (folder / "config.json").write_text(json.dumps(values))
    assert "does not say num_layers, kv_channels" in refusal(folder)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Edits the tensors of the file that holds the first layer's `query_key_value`."""
    for path in sorted(folder.glob("*model-*")):
        bin_file = path.suffix == ".bin"
        tensors = torch.load(path) if bin_file else load_file(path)
        if QKV not in tensors:
            continue
        edit(tensors)
        torch.save(tensors, path) if bin_file else save_file(tensors, path)
        index = next(folder.glob("*.index.json"))
        where = json.loads(index.read_text())["weight_map"]
        where = {k: file for k, file in where.items() if file != path.name}
        where |= dict.fromkeys(tensors, path.name)
        index.write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_tensors_that_do_not_fit_the_configuration(tmp_path: Path, form: str):
    edits: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
        f"lacks {QKV} in its files": lambda t: t.pop(QKV),
        "holds transformer.extra, which its configuration": lambda t: t.update(
            {"transformer.extra": torch.zeros(2)}
        ),
        "transformer.prefix_encoder.embedding.weight (a prefix of P-tuning)": lambda t: t.update(
            {"transformer.prefix_encoder.embedding.weight": torch.zeros(2)}
        ),
        f"{QKV} has the shape (60, 32)": lambda t: t.update({QKV: t[QKV][:60].clone()}),
        f"{QKV} has the shape (64,)": lambda t: t.update({QKV: t[QKV][:, 0].clone()}),
        f"{QKV} is stored as I8": lambda t: t.update({QKV: t[QKV].to(torch.int8)}),
        "stored as torch.complex64" if form == "bin" else "stored as I64": lambda t: t.update(
            {QKV: t[QKV].to(torch.complex64 if form == "bin" else torch.int64)}
        ),
    }
    for number, (words, edit) in enumerate(edits.items()):
        folder = write_original(tmp_path / f"{number}", form=form)
        change(folder, edit)
        assert words in refusal(folder)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_files_that_are_cut_off_missing_or_something_else(tmp_path: Path, form: str):
    def cut(path: Path, length: int) -> None:
        path.write_bytes(path.read_bytes()[:length])

    edits: dict[str, Callable[[Path], Any]] = {
        "damaged or cut off": lambda path: cut(path, -1000),
        "cut off": lambda path: cut(path, 0),
        "is missing": lambda path: path.unlink(),
        " cut off": lambda path: path.write_bytes(os.urandom(3000)),
    }
    for number, (words, edit) in enumerate(edits.items()):
        folder = write_original(tmp_path / f"{number}", form=form)
        edit(sorted(folder.glob("*model-*"))[1])
        assert words in refusal(folder)


class Harm:
    """What a pickle may do when it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_that_would_run_a_program_is_refused_and_not_run(tmp_path: Path, how: str):
    folder = write_original(tmp_path / "model", form="bin")
    path = folder / "pytorch_model-00001-of-00002.bin"
    values = torch.load(path) | {"transformer.extra": Harm(tmp_path / "harm")}
    if how == "torch":
        torch.save(values, path)
    else:
        path.write_bytes(pickle.dumps(values))
    assert "refused" in refusal(folder) or "not a file of tensors" in refusal(folder)
    assert not (tmp_path / "harm").exists()


def test_a_file_with_more_than_tensors_is_refused(tmp_path: Path):
    for number, values in enumerate(({"step": 3}, [torch.zeros(2)], {1: torch.zeros(2)})):
        folder = write_original(tmp_path / f"{number}", form="bin", shards=1)
        torch.save(values, folder / "pytorch_model-00001-of-00001.bin")
        assert "other things than tensors" in refusal(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path):
    folder = write_original(tmp_path / "model", form="bin")
    first, second = sorted(folder.glob("pytorch_model-*"))
    torch.save(torch.load(first) | torch.load(second), second)
    assert "is in pytorch_model-00001-of-00002.bin and" in refusal(folder)


def test_a_folder_without_weights_says_which_files_it_lacks(tmp_path: Path):
    folder = write_original(tmp_path / "model", shards=1)
    for path in folder.glob("model*"):
        path.unlink()
    assert "neither model.safetensors nor pytorch_model.bin" in refusal(folder)


def test_a_damaged_index_is_named(tmp_path: Path):
    folder = write_original(tmp_path / "model", form="bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text("{")
    assert "has no readable weight_map" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {QKV: "../x.bin"}}))
    assert "outside the folder" in refusal(folder)


def test_a_form_that_glm_has_not_is_named(tmp_path: Path):
    from lorakit.models.load import load_for_task

    folder = write_original(tmp_path / "model")
    with pytest.raises(InputError, match="AutoModelForSeq2SeqLM"):
        load_for_task("SEQ_2_SEQ_LM", str(folder))
