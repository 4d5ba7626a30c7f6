"""Scripts written for PEFT since 2023, and every argument of its functions."""

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit
from families import output, wrap
from lorakit import (
    LoraConfig,
    LoraModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from lorakit.errors import InputError
from lorakit.lora.checkpoint import read_adapter
from lorakit.lora.layers import LoraLayer
from lorakit.lora.locate import HUB, MODEL, PLACEMENT

NO_KEYWORD = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)

REFUSED = {
    "push_to_hub": {"max_shard_size", "tags"},
    "get_eva_state_dict": {
        "prepare_model_inputs_fn",
        "prepare_layer_inputs_fn",
        "gather_distributed_inputs",
    },
    "initialize_lora_eva_weights": {
        "prepare_model_inputs_fn",
        "prepare_layer_inputs_fn",
        "gather_distributed_inputs",
    },
}
"""Arguments of PEFT's that are no argument here, by function: a TypeError."""


def pairs() -> dict[str, tuple[Any, Any]]:
    """PEFT's functions and methods beside ours, by name."""
    names = set(dir(peft.PeftModel)) & set(dir(PeftModel)) - set(dir(nn.Module))
    found = {
        name: (getattr(peft.PeftModel, name), getattr(PeftModel, name))
        for name in names
        if not name.startswith("_") and callable(getattr(peft.PeftModel, name))
    }
    for name in set(peft.__all__) & set(lorakit.__all__):
        if not inspect.isclass(getattr(peft, name)):
            found[name] = getattr(peft, name), getattr(lorakit, name)
    return found


@pytest.mark.parametrize("name", sorted(pairs()))
def test_every_argument_of_pefts_has_its_place_or_is_refused(name: str):
    theirs, ours = (inspect.signature(function).parameters for function in pairs()[name])
    refused = REFUSED.get(name, set())
    assert not refused & ours.keys(), "what is refused is no argument"
    assert refused <= theirs.keys(), "PEFT has it no more"
    usual = [p for p in theirs.values() if p.kind not in NO_KEYWORD]
    assert {p.name for p in usual} <= {*ours, *refused}
    by_place = [p.name for p in usual if p.kind is p.POSITIONAL_OR_KEYWORD]
    mine = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    first_refused = next((i for i, n in enumerate(by_place) if n in refused), len(by_place))
    assert mine[:first_refused] == by_place[:first_refused], "in the same order"


def test_a_misspelt_argument_names_the_right_one(build, tmp_path: Path):
    model = wrap(build(), target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"is_trainble.*did you mean 'is_trainable'"):
        PeftModel.from_pretrained(build(), tmp_path, is_trainble=True)
    with pytest.raises(TypeError, match=r"revison.*did you mean 'revision'"):
        PeftModel.from_pretrained(build(), "owner/name", revison="main")
    with pytest.raises(TypeError, match=r"load_adapter.*tokn.*did you mean 'token'"):
        model.load_adapter(tmp_path, "other", tokn="x")
    with pytest.raises(TypeError, match=r"selected_adapter.*did you mean 'selected_adapters'"):
        model.save_pretrained(tmp_path / "x", selected_adapter=["default"])
    assert not (tmp_path / "x").exists()
    assert model.adapters == ["default"]


def test_what_a_loader_takes_besides_does_no_harm_with_a_folder_or_an_id(
    build, ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = wrap(build(), target_modules=["q_proj"])
    source.save_pretrained(tmp_path)
    asked: dict[str, Any] = {}

    def from_the_hub(repo: str, allow_patterns: Any, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr("lorakit.lora.locate.snapshot_download", from_the_hub)
    others = dict.fromkeys((*MODEL, *PLACEMENT)) | {"torch_dtype": torch.float16}
    hub = {"revision": "main", "token": "t", "cache_dir": str(tmp_path), "local_files_only": True}
    for name in (tmp_path, "owner/name"):
        model = PeftModel.from_pretrained(build(), name, torch_device="cpu", **others, **hub)
        assert torch.equal(output(model, ids), output(source, ids))
        model.load_adapter(name, "other", low_cpu_mem_usage=True, **others, **hub)
        assert model.adapters == ["default", "other"]
    assert asked == hub
    PeftModel.from_pretrained(build(), "owner/name", use_auth_token="old")
    assert asked["token"] == "old"
    assert set(asked) <= set(HUB)


def test_what_cannot_be_honoured_is_refused_or_named(build, tmp_path: Path):
    model = wrap(build(), target_modules=["q_proj"])
    with pytest.warns(UserWarning, match="writes no pickles"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.bin"))
    for refused in (
        lambda: PeftModel.from_pretrained(build(), tmp_path, ephemeral_gpu_offload=True),
        lambda: get_peft_model(build(), LoraConfig(target_modules=["q_proj"]), mixed=True),
    ):
        with pytest.raises(InputError):
            refused()
    config = LoraConfig(target_modules=["q_proj"])
    assert get_peft_model(build(), config, revision="v2").peft_config["default"].revision == "v2"
    assert config.revision is None


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"trainable_token_indices": [1, 41]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_embeddings_of_a_resized_model_go_with_its_adapter(build, ids, tmp_path: Path, fields: Any):
    build().float().save_pretrained(tmp_path / "base")

    def resized(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(44, mean_resizing=False)
        return model

    more = torch.tensor([[1, 41, 43]])
    model = wrap(resized(1), **{"target_modules": ["q_proj"]} | fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter))
    with pytest.warns(UserWarning, match="had 40 tokens and has 44 now"):
        model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(resized(2), tmp_path / "adapter")
    torch.testing.assert_close(output(again, more), output(model, more), rtol=0, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(resized(2), str(tmp_path / "adapter"))
    torch.testing.assert_close(output(theirs, more), output(model, more), rtol=0, atol=1e-5)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert not [key for key in state if key.endswith("lm_head.weight")]

    plain = wrap(build(), target_modules=["q_proj"])
    plain.save_pretrained(tmp_path / "plain")
    assert not [key for key in read_adapter(tmp_path / "plain")[1] if "lora_" not in key]
    plain.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    kept = [key for key in read_adapter(tmp_path / "whole")[1] if "lora_" not in key]
    prefix = "base_model.model."
    assert sorted(kept) == [f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"]


def test_keys_are_renamed_before_they_are_loaded(build, ids, tmp_path: Path):
    model = wrap(build(), target_modules=["q_proj"], init_lora_weights="pissa")
    model.save_pretrained(tmp_path)
    for name in ("adapter_model.safetensors", "initial_factors.safetensors"):
        tensors = load_file(tmp_path / name)
        save_file(
            {k.replace(".layers.", ".blocks."): t for k, t in tensors.items()}, tmp_path / name
        )
    with pytest.raises(InputError):
        PeftModel.from_pretrained(build(), tmp_path)
    mapping = {r"\.blocks\.(\d+)": r".layers.\1"}
    again = PeftModel.from_pretrained(build(), tmp_path, key_mapping=mapping)
    torch.testing.assert_close(output(again, ids), output(model, ids), rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="gives two tensors the key"):
        PeftModel.from_pretrained(build(), tmp_path, key_mapping={r".*": "one"})


def test_a_state_that_was_gathered_elsewhere_is_saved(build, tmp_path: Path):
    model = wrap(build(), target_modules=["q_proj"])
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered, max_shard_size="5GB")
    _, tensors = read_adapter(tmp_path)
    for key, tensor in get_peft_model_state_dict(model).items():
        assert torch.equal(tensors[key], (tensor + 1).to(tensors[key]))


# --- whole scripts ------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        return {"input_ids": [1, 2, 3, i + 4], "labels": [1, 2, 3, i + 4]}


def trained(model: nn.Module, folder: Path, kind: Any = transformers.Trainer, **more: Any) -> Any:
    trainer = kind(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=2,
            learning_rate=0.1,
            save_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Rows(),
        data_collator=transformers.default_data_collator,
        **more,
    )
    trainer.train()
    return trainer


def test_alpaca_lora(build, ids, tmp_path: Path):
    base = build().float()
    model = get_peft_model(
        prepare_model_for_kbit_training(copy.deepcopy(base)),
        LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=["q_proj", "v_proj"],
            lora_dropout=0.05,
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )
    model.config.use_cache = False
    old_state_dict = model.state_dict
    model.state_dict = (
        lambda self, *_, **__: get_peft_model_state_dict(self, old_state_dict())
    ).__get__(model, type(model))
    own = model.state_dict()
    assert own.keys() == get_peft_model_state_dict(model).keys()
    trained(model, tmp_path / "out")
    saved = get_peft_model_state_dict(model, model.state_dict())
    assert all(torch.equal(saved[key], tensor) for key, tensor in model.state_dict().items())
    assert any(tensor.any() for key, tensor in saved.items() if "lora_B" in key)
    model.save_pretrained(tmp_path / "adapter")
    model.eval()

    again = PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "adapter", torch_dtype=torch.float32, device_map={"": "cpu"}
    )
    assert torch.equal(output(again, ids), output(model, ids))
    resumed = get_peft_model(copy.deepcopy(base), model.peft_config["default"])
    set_peft_model_state_dict(resumed, saved)
    assert torch.equal(output(resumed.eval(), ids), output(model, ids))

    # Its export to a plain model, by names.
    expected = output(again, ids)
    merged = again.merge_and_unload()
    merged.train(False)
    plain = {
        key.replace("base_model.model.", ""): tensor
        for key, tensor in merged.state_dict().items()
        if "lora" not in key
    }
    assert plain.keys() == base.state_dict().keys()
    base.save_pretrained(tmp_path / "plain", state_dict=plain, max_shard_size="400MB")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(output(loaded.eval(), ids), expected, rtol=1e-5, atol=1e-5)


def test_qlora(build, ids, tmp_path: Path):
    base = prepare_model_for_kbit_training(build().float(), use_gradient_checkpointing=True)
    names = {
        name.split(".")[-1]
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
    } - {"lm_head"}
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=list(names), lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) or "norm" in name:
            module.to(torch.float32)

    class SavePeftModel(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "adapter_model"
            kwargs["model"].save_pretrained(folder)

    trained(model, tmp_path, callbacks=[SavePeftModel()])
    folder = tmp_path / "checkpoint-2" / "adapter_model"
    again = PeftModel.from_pretrained(build().float(), str(folder), is_trainable=True)
    assert all(p.requires_grad for n, p in again.named_parameters() if "lora_" in n)
    assert torch.equal(output(again.eval(), ids), output(model.eval(), ids))


def test_chatglm_tuning(build, ids, tmp_path: Path):
    class CastOutputToFloat(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).to(torch.float32)

    class ModifiedTrainer(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss

        def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
            wanted = {n: p.to("cpu") for n, p in self.model.named_parameters() if p.requires_grad}
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            torch.save(wanted, Path(output_dir) / "adapter_model.bin")

    def prepared() -> nn.Module:
        model = build().float()
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.lm_head = CastOutputToFloat(model.lm_head)
        model.config.use_cache = False
        return model

    fields = {"task_type": lorakit.TaskType.CAUSAL_LM, "r": 8, "lora_alpha": 32}
    config = LoraConfig(**fields, inference_mode=False, lora_dropout=0.1)
    model = get_peft_model(prepared(), config)  # PEFT's default targets of the architecture
    ModifiedTrainer.save_model(trained(model, tmp_path, ModifiedTrainer), tmp_path / "end")
    again = get_peft_model(prepared(), LoraConfig(**fields, inference_mode=True))
    again.load_state_dict(torch.load(tmp_path / "end" / "adapter_model.bin"), strict=False)
    assert torch.equal(output(again.eval(), ids), output(model.eval(), ids))


def test_todays_examples(build, ids, tmp_path: Path):
    base = build().float()
    config = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0
    )
    model = get_peft_model(copy.deepcopy(base), config, "default", False, True)
    assert isinstance(model, LoraModel)
    trained(model, tmp_path / "out").save_model(str(tmp_path / "model"))
    model.eval().save_pretrained(str(tmp_path / "adapter"), True, ["default"])
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    assert torch.equal(output(again, ids), output(model, ids))
    again.load_adapter(str(tmp_path / "adapter"), adapter_name="second", is_trainable=False)
    again.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", "linear")
    again.set_adapter("both")
    torch.testing.assert_close(output(again, ids), output(model, ids), rtol=1e-4, atol=1e-5)
    with again.disable_adapter():
        assert torch.equal(output(again, ids), output(base, ids))
    merged = again.merge_and_unload(progressbar=True, safe_merge=True)
    torch.testing.assert_close(output(merged, ids), output(model, ids), rtol=1e-4, atol=1e-5)
