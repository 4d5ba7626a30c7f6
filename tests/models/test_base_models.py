"""Every family is adapted by the presets, trained, saved, loaded and merged, and as PEFT does it.

The table in docs/models.md is made of what is found here:
`LORAKIT_WRITE_TABLES=1 pytest tests/models/test_base_models.py -k table` writes it.
"""

import os
import warnings
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from base_models import BASE_MODELS, BaseModel, Inputs
from lorakit import LoraConfig, LoraModel, get_peft_model
from lorakit.adapters.merge import merge
from lorakit.errors import InputError
from lorakit.lora.architecture import expert_parameters, language_part
from lorakit.lora.layers import LoraLayer
from lorakit.lora.presets import PRESETS
from lorakit.lora.wrapping import wrapped_modules
from matrix import few

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = (
    "<!-- families: written by tests/models/test_base_models.py -->",
    "<!-- families end -->",
)
BY_NAME = {base.name: base for base in BASE_MODELS}

MISREAD = ("DeepSeek V2", "DeepSeek V3")
"""PEFT 0.21 takes the names of their linear layers in MLPs for those of experts, which are none."""

# A model that differs between the two by more than rounding, in float32.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What presets say of a family has tests of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def steps(model: nn.Module, inputs: Inputs, count: int = 3) -> list[float]:
    """The losses before each of a few steps, and after the last."""
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(own, lr=0.1)
    losses = []
    for _ in range(count):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return [*losses, model(**inputs).loss.item()]


@torch.no_grad()
def logits(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    return model.eval()(**inputs).logits


def adapted(base: BaseModel, **fields: object) -> LoraModel:
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 16, **base.trained_whole, **fields}
    return get_peft_model(base.build(), LoraConfig(**config)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "preset"),
    few(
        list(product(BY_NAME, PRESETS)),
        *product(BY_NAME, ["all-linear"]),
        *product(["Llama"], set(PRESETS) - {"all-linear"}),
    ),
)
def test_a_preset_adapts_trains_saves_loads_merges_and_agrees_with_peft(
    name: str, preset: str, tmp_path: Path
):
    base = BY_NAME[name]
    inputs = base.inputs()
    ours = adapted(base, target_modules=preset)
    torch.testing.assert_close(logits(ours, inputs), logits(base.build(), inputs), rtol=0, atol=0)
    ours.save_pretrained(tmp_path / "begun")
    losses = steps(ours, inputs)
    assert losses[-1] < losses[0]
    for path, layer in wrapped_modules(ours.get_base_model()):
        if isinstance(layer, LoraLayer):
            assert layer.matrices("default")[1].any(), f"{path} has learned nothing"
    expected = logits(ours, inputs)

    ours.save_pretrained(tmp_path / "trained")
    loaded = LoraModel.from_pretrained(base.build(), tmp_path / "trained")
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)
    merged = loaded.merge_and_unload()
    assert {n for n, _ in merged.named_parameters()} == {
        n for n, _ in base.build().named_parameters()
    }
    torch.testing.assert_close(logits(merged, inputs), expected, **CLOSE)

    theirs = peft.PeftModel.from_pretrained(base.build(), tmp_path / "begun", is_trainable=True)
    if preset == "all-linear" and base.name in MISREAD:
        layers = {n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
        assert not any("shared_experts" in name for name in layers)
        return
    assert steps(theirs.eval(), inputs) == pytest.approx(losses, rel=1e-4)
    again = peft.PeftModel.from_pretrained(base.build(), tmp_path / "trained")
    torch.testing.assert_close(logits(again, inputs), expected, **CLOSE)


@pytest.mark.parametrize("name", [base.name for base in BASE_MODELS if base.is_causal])
def test_files_merged_one_by_one_are_the_adapted_model(name: str, tmp_path: Path):
    base = BY_NAME[name]
    base.build().save_pretrained(tmp_path / "base")
    ours = adapted(base, target_modules="all-linear")
    steps(ours, base.inputs())
    ours.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    ours.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", verify=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    found = logits(merged, base.inputs())
    torch.testing.assert_close(found, logits(ours, base.inputs()), **CLOSE)


@pytest.mark.parametrize("name", [base.name for base in BASE_MODELS if base.is_causal])
def test_tokens_that_are_new_are_trained_and_come_back(name: str, tmp_path: Path):
    base = BY_NAME[name]

    def resized() -> nn.Module:
        torch.manual_seed(2)
        model = base.build()
        model.resize_token_embeddings(50, mean_resizing=False)
        return model.eval()

    inputs = base.inputs()
    inputs["input_ids"][:, :3] = torch.tensor([48, 49, 48])
    inputs["labels"] = inputs["input_ids"].clone()
    model = resized()
    tied = model.config.tie_word_embeddings
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        trainable_token_indices=[48, 49],
        ensure_weight_tying=tied,
    )
    ours = get_peft_model(model, config).eval()
    rows = ours.get_input_embeddings().weight.detach().clone()
    losses = steps(ours, inputs)
    assert losses[-1] < losses[0]
    expected = logits(ours, inputs)
    ours.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(resized(), tmp_path)
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)
    merged = loaded.merge_and_unload()
    after = merged.get_input_embeddings().weight
    assert torch.equal(after[:48], rows[:48])
    assert not torch.equal(after[48:], rows[48:])
    head = merged.get_output_embeddings().weight
    assert (head is after) == tied
    torch.testing.assert_close(logits(merged, inputs), expected, **CLOSE)


@pytest.mark.parametrize(
    "name", [base.name for base in BASE_MODELS if expert_parameters(base.build())]
)
def test_experts_are_named_and_adapted_where_they_are_asked_for(name: str, tmp_path: Path):
    base = BY_NAME[name]
    with pytest.warns(UserWarning, match=r"target_parameters=\[experts.gate_up_proj, experts"):
        adapted(base, target_modules="all-linear")
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    ours = adapted(base, target_modules="all-linear", target_parameters=experts)
    ours.save_pretrained(tmp_path / "begun")
    losses = steps(ours, base.inputs())
    assert losses[-1] < losses[0]
    assert len(ours.targeted_parameter_names) == len(expert_parameters(base.build()))
    if base.name in MISREAD:
        with pytest.raises(RuntimeError, match="size mismatch"):
            peft.PeftModel.from_pretrained(base.build(), tmp_path / "begun")
        return
    theirs = peft.PeftModel.from_pretrained(base.build(), tmp_path / "begun", is_trainable=True)
    assert steps(theirs.eval(), base.inputs()) == pytest.approx(losses, rel=1e-4)


def test_only_the_language_part_of_a_model_for_pictures_is_adapted_and_it_is_said(tmp_path: Path):
    base = BY_NAME["Llava"]
    with pytest.warns(UserWarning, match=r"the language part \(model.language_model\) alone"):
        ours = adapted(base, target_modules="attention")
    assert all("language_model" in path for path in ours.targeted_module_names)
    expression = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj)"
    assert ours.peft_config["default"].target_modules == expression
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = adapted(base, target_modules=["q_proj"])  # names mean what they say
    assert any("vision_tower" in path for path in both.targeted_module_names)


def test_a_mixer_of_mambas_kind_is_adapted_where_its_layers_are_called():
    with pytest.raises(InputError, match=r"mixer.dt_proj, whose weight Mamba reads"):
        adapted(BY_NAME["Mamba"], target_modules=["in_proj", "dt_proj"])


class Unlisted(nn.Module):
    """A model of nobody's family, with projections in one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(8, 8), "widen": nn.Linear(8, 16)}) for _ in range(2)
        )
        self.narrow = nn.Linear(16, 8, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + self.narrow(block["widen"](torch.relu(block["mix"](x))))
        return x


@pytest.mark.parametrize("targets", ["all-linear", r"blocks\.1\.(mix|widen)"])
def test_a_family_that_nobody_listed_works(targets: str, tmp_path: Path):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Unlisted()

    ids = torch.arange(12).reshape(2, 6)
    ours = get_peft_model(build(), LoraConfig(r=2, target_modules=targets))
    assert len(ours.targeted_module_names) == (5 if targets == "all-linear" else 2)
    ours(ids).square().mean().backward()
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.add_(torch.randn_like(parameter) * 0.1)
    ours.save_pretrained(tmp_path)
    expected = ours.eval()(ids)
    loaded = LoraModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(loaded(ids), expected, rtol=0, atol=0)
    torch.testing.assert_close(loaded.merge_and_unload()(ids), expected, **CLOSE)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(theirs(ids), expected, **CLOSE)


def kinds(base: BaseModel, preset: str) -> list[str]:
    """The endings of the names of what `preset` adapts, or their last parts in a language part."""
    ours = adapted(base, target_modules=preset)
    written = ours.peft_config["default"].target_modules
    if isinstance(written, list):
        return written
    return list(dict.fromkeys(path.rpartition(".")[2] for path in ours.targeted_module_names))


def row(base: BaseModel) -> str:
    """A family's line in the table: what the larger preset adds to the smaller one."""
    model = base.build()
    found = [kinds(base, preset) for preset in PRESETS]
    more = [
        found[0],
        *([k for k in b if k not in a] for a, b in pairwise(found)),
    ]
    shown = [", ".join(f"`{kind}`" for kind in one) or "the same" for one in more]
    notes = []
    if base.name in MISREAD:
        notes.append("PEFT 0.21 does not read `all-linear` of it")
    if language_part(model):
        notes.append("language part alone")
    if experts := expert_parameters(model):
        names = dict.fromkeys(".".join(name.split(".")[-2:]) for name in experts)
        notes.append("experts: " + ", ".join(f"`{name}`" for name in names))
    if base.trained_whole:
        notes.append("head trained whole")
    elif (head := model.get_output_embeddings()) is not None:
        tied = head.weight is model.get_input_embeddings().weight
        notes.append("head and embedding tied" if tied else "head apart")
    cells = [base.name, f"`{base.kind}`", *shown, "; ".join(notes)]
    return f"| {' | '.join(cells)} |"


def test_the_table_in_the_documents_is_what_was_found():
    headings = "| model | class | attention-minimal | attention: and | all-linear: and | besides |"
    lines = [BEGIN, "", headings, "| --- | --- | --- | --- | --- | --- |", *map(row, BASE_MODELS)]
    table = "\n".join([*lines, "", END])
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    written, end, after = rest.partition(END)
    assert end, f"{DOCUMENT} has lost its marks"
    if os.environ.get("LORAKIT_WRITE_TABLES"):
        DOCUMENT.write_text(before + table + after, encoding="utf-8")
        return
    assert BEGIN + written + END == table, "write it anew with LORAKIT_WRITE_TABLES=1"
