"""Every family is adapted by the presets, trained, saved, loaded and merged, and as PEFT does it.

One test body a step, over one list of families (`base_models.py`). The table in docs/models.md is
made of what is found here: `LORAKIT_WRITE_TABLES=1 pytest tests/models/test_base_models.py -k
table` writes it.
"""

import warnings
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path

import peft
import pytest
import torch
from peft.utils import transformers_weight_conversion as peft_conversion
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as CONVERTED

from answered import each_alone, tokens
from base_models import BASE_MODELS, BaseModel, Inputs
from lorakit import LoraConfig, LoraModel, get_peft_model
from lorakit.adapters.merge import merge
from lorakit.data.batches import Collator, LineCollator
from lorakit.data.masking import TokenizedRow
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from lorakit.lora.architecture import expert_parameters, language_part
from lorakit.lora.layers import LoraLayer
from lorakit.lora.presets import PRESETS
from lorakit.lora.targets import resolve_targets, task_heads, written_targets
from lorakit.lora.wrapping import wrapped_modules
from lorakit.models.lines import take_lines
from lorakit.models.loss import SupervisedLoss
from lorakit.models.new_tokens import add_tokens
from matrix import few
from random_adapters import make_adapter
from tiny import byte_tokenizer
from written_tables import ANEW, WrittenTable

TABLE = WrittenTable(
    Path(__file__).parents[2] / "docs" / "models.md",
    "<!-- families: written by tests/models/test_base_models.py -->",
    "<!-- families end -->",
)
BY_NAME = {base.name: base for base in BASE_MODELS}
CAUSAL = [base.name for base in BASE_MODELS if base.is_causal]
MIXTURES = [base.name for base in BASE_MODELS if expert_parameters(base.build())]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
FIXED = ("DeepSeek V4",)
"""The experts of its first layers are chosen by a table of all tokens."""

USUAL = ("Llama", "gpt-oss", "Qwen 3.5")
"""Those that every change runs: attention alone, experts and sinks, linear attention."""

# A model that differs between the two by more than rounding: float32 inside, in float64 outside.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
STORED = {"rtol": 2e-4, "atol": 2e-5}
"""In float32, as files have it."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What presets say of a family has tests of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def gradients(model: nn.Module, inputs: Inputs) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss, and its gradients by the parameters' names in PEFT's files."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), {name.removeprefix("base_model.model."): g for name, g in found.items()}


def steps(model: nn.Module, inputs: Inputs, count: int = 3) -> list[float]:
    """The losses before each of a few steps, and after the last."""
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(own, lr=0.02)
    losses = []
    for _ in range(count):
        losses.append(gradients(model, inputs)[0])
        optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        return [*losses, model(**inputs).loss.item()]


@torch.no_grad()
def logits(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    return model.eval()(**inputs).logits


def wide(base: BaseModel) -> tuple[nn.Module, Inputs]:
    """The model and its inputs in float64."""
    floats = {k: x.double() if x.is_floating_point() else x for k, x in base.inputs().items()}
    return base.build().double(), floats


def adapted(base: BaseModel, **fields: object) -> LoraModel:
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 16, **base.trained_whole, **fields}
    model = get_peft_model(wide(base)[0], LoraConfig(**config))  # type: ignore[arg-type]
    return model.double().eval()


def in_peft(base: BaseModel, folder: Path, trainable: bool = False) -> nn.Module:
    """PEFT's model of the adapter in `folder`, with names that mean what they say (`misread`)."""
    model = wide(base)[0]
    if misread(base):
        model.config.model_type = "as it is"
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable).double().eval()


def misread(base: BaseModel) -> list[str]:
    """Names of linear layers that PEFT 0.21 takes for those of experts in transformers 4."""
    model = base.build()
    known = peft_conversion._MOE_TARGET_MODULE_MAPPING
    kind = CONVERTED.get(model.config.model_type, "")
    linear = {name.rpartition(".")[2] for name in resolved(base, "all-linear")}
    return sorted(linear.intersection(known.get(kind, ())))


@pytest.mark.parametrize(
    ("name", "preset"),
    few(
        list(product(BY_NAME, PRESETS)),
        *product([*USUAL, "BERT", "T5"], ["all-linear"]),
        *product(["Llama"], set(PRESETS) - {"all-linear"}),
    ),
)
def test_a_preset_adapts_trains_saves_loads_merges_and_agrees_with_peft(
    name: str, preset: str, tmp_path: Path
):
    base = BY_NAME[name]
    plain, inputs = wide(base)
    ours = adapted(base, target_modules=preset)
    torch.testing.assert_close(logits(ours, inputs), logits(plain, inputs), rtol=0, atol=0)
    ours.save_pretrained(tmp_path / "begun")
    losses = steps(ours, inputs)
    assert losses[-1] < losses[0]
    for path, layer in wrapped_modules(ours.get_base_model()):
        if isinstance(layer, LoraLayer):
            assert layer.matrices("default")[1].any(), f"{path} has learned nothing"
    assert steps(in_peft(base, tmp_path / "begun", True), inputs) == pytest.approx(losses, rel=1e-6)
    expected = logits(ours, inputs)

    ours.save_pretrained(tmp_path / "trained")
    loaded = LoraModel.from_pretrained(plain, tmp_path / "trained").double()
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)
    theirs = in_peft(base, tmp_path / "trained", True)
    torch.testing.assert_close(logits(theirs, inputs), expected, **CLOSE)
    loss, own = gradients(ours, inputs)
    their_loss, found = gradients(theirs, inputs)
    assert loss == pytest.approx(their_loss, rel=1e-9)
    assert own.keys() == found.keys()
    for key, gradient in own.items():
        assert (gradient - found[key]).abs().max() <= 1e-6 * (1 + gradient.abs().max()), key
    merged = loaded.merge_and_unload()
    assert {n for n, _ in merged.named_parameters()} == {
        n for n, _ in base.build().named_parameters()
    }
    torch.testing.assert_close(logits(merged, inputs), expected, **CLOSE)


@pytest.mark.parametrize("name", few(CAUSAL, *USUAL))
def test_rows_of_two_adapters_and_of_none_are_what_each_is_alone(name: str):
    base = BY_NAME[name]
    fields = {"target_modules": "all-linear", "init_lora_weights": False}
    if name in MIXTURES:
        fields["target_parameters"] = EXPERTS
    model = adapted(base, **fields)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=9, **fields))
    ids = base.inputs()["input_ids"]
    rows = ["other", "__base__", "default", "other"]
    ids = torch.cat([ids, ids])
    mixed = logits(model.double(), {"input_ids": ids, "adapter_names": rows})
    for i, row in enumerate(rows):
        model.set_adapter([] if row == "__base__" else row)
        torch.testing.assert_close(mixed[i], logits(model, {"input_ids": ids})[i], **CLOSE)
    assert (mixed[0] - mixed[2]).abs().max() > 1e-3


ROWS = [
    TokenizedRow([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9], "a"),
    TokenizedRow([11, 3, *range(12, 21)], [-100, -100, *range(12, 21)], "b"),
    TokenizedRow([20, 21, 22], [-100, 21, 22], "c"),
]


@pytest.mark.parametrize("name", few(CAUSAL, *USUAL))
def test_rows_in_a_line_or_padded_have_the_loss_and_gradients_of_single_rows(name: str):
    """A model that takes no lines is given padded rows, and its padding changes nothing."""
    model = adapted(BY_NAME[name], target_modules="all-linear", init_lora_weights=False)
    loss = SupervisedLoss(model)

    def of(batches: list[dict]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        total = sum(loss(model, batch)[0] for batch in batches)
        total.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": total.detach(), **found}

    pad = Collator(0, pad_to_multiple_of=1)
    single = of([pad([row]) for row in ROWS])
    together = [of([pad(ROWS)])]
    if take_lines(model) is None:
        together.append(of([LineCollator()(ROWS)]))
    for found in together:
        assert found.keys() == single.keys()
        for key, tensor in single.items():
            # Norms round to float32 inside.
            assert (found[key] - tensor).abs().max() <= 1e-5 * (1 + tensor.abs().max()), key


def saved(base: BaseModel, folder: Path, scale: float = 1.0) -> Path:
    """The model's folder, with a tokenizer."""
    model = base.build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", few(CAUSAL, *USUAL))
def test_files_merged_one_by_one_are_the_adapted_model(name: str, tmp_path: Path):
    base = BY_NAME[name]
    folder = saved(base, tmp_path / "base")
    fields: dict = {"target_parameters": EXPERTS} if name in MIXTURES else {}
    ours = adapted(base, target_modules="all-linear", init_lora_weights=False, **fields).float()
    ours.peft_config["default"].base_model_name_or_path = str(folder)
    ours.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", verify=False)
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found = logits(merged, base.inputs())
    torch.testing.assert_close(found, logits(ours, base.inputs()), **STORED)


@pytest.mark.parametrize("name", few(CAUSAL, "gpt-oss"))
def test_an_engine_answers_rows_of_several_adapters_as_generate_does_each(
    name: str, tmp_path: Path
):
    folder = saved(BY_NAME[name], tmp_path / "base", scale=8)
    adapters = {who: make_adapter(folder, tmp_path / who, seed) for seed, who in enumerate("ab")}
    prompts = {"a": [7, 8, 9, 10, 11, 12], "b": [20, 21], None: [*range(30, 39)]}
    engine = open_engine(str(folder), adapters, dtype="float32", max_rows=3)
    try:
        sampling = Sampling(max_new_tokens=6, logprobs=0)
        tickets = {who: engine.submit(ids, who, sampling) for who, ids in prompts.items()}
        found = {who: tokens(ticket) for who, ticket in tickets.items()}
    finally:
        engine.close()
    ends = [BY_NAME[name].values["eos_token_id"]]
    answers = each_alone(folder, adapters, ((ids, who) for who, ids in prompts.items()), 6, ends)
    assert [*found.values()] == answers


def test_a_model_with_a_table_of_its_vocabulary_takes_no_new_tokens():
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match=r"mlp\.gate\.tid2eid"):
        add_tokens(BY_NAME[FIXED[0]].build(), tokenizer, ["<new>"])


@pytest.mark.parametrize("name", few([n for n in CAUSAL if n not in FIXED], *USUAL))
def test_tokens_that_are_new_are_trained_and_come_back(name: str, tmp_path: Path):
    base = BY_NAME[name]

    def resized() -> nn.Module:
        torch.manual_seed(2)
        model = base.build()
        model.resize_token_embeddings(50, mean_resizing=False)
        return model.double().eval()

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
    ours = get_peft_model(model, config).double().eval()
    rows = ours.get_input_embeddings().weight.detach().clone()
    losses = steps(ours, inputs)
    assert losses[-1] < losses[0]
    expected = logits(ours, inputs)
    ours.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(resized(), tmp_path).double()
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)
    merged = loaded.merge_and_unload()
    after = merged.get_input_embeddings().weight
    assert torch.equal(after[:48], rows[:48])
    assert not torch.equal(after[48:], rows[48:])
    head = merged.get_output_embeddings().weight
    assert (head is after) == tied
    torch.testing.assert_close(logits(merged, inputs), expected, **CLOSE)


@pytest.mark.parametrize("name", few(MIXTURES, "gpt-oss"))
def test_experts_are_named_and_adapted_where_they_are_asked_for(name: str, tmp_path: Path):
    base = BY_NAME[name]
    plain, inputs = wide(base)
    with pytest.warns(UserWarning, match=r"target_parameters=\[experts.gate_up_proj, experts"):
        adapted(base, target_modules="all-linear")
    ours = adapted(base, target_modules="all-linear", target_parameters=EXPERTS)
    ours.save_pretrained(tmp_path / "begun")
    losses = steps(ours, inputs)
    assert losses[-1] < losses[0]
    assert len(ours.targeted_parameter_names) == len(expert_parameters(plain))
    assert steps(in_peft(base, tmp_path / "begun", True), inputs) == pytest.approx(losses, rel=1e-6)
    expected = logits(ours, inputs)
    ours.save_pretrained(tmp_path / "trained")
    theirs = in_peft(base, tmp_path / "trained")
    torch.testing.assert_close(logits(theirs, inputs), expected, **CLOSE)
    theirs.save_pretrained(tmp_path / "theirs")
    back = LoraModel.from_pretrained(plain, tmp_path / "theirs").double()
    torch.testing.assert_close(logits(back, inputs), expected, **CLOSE)
    torch.testing.assert_close(logits(back.merge_and_unload(), inputs), expected, **CLOSE)


@pytest.mark.parametrize("name", few(list(BY_NAME), "Qwen3-Next"))
def test_what_peft_makes_of_all_linear_layers_is_read_as_it_is(name: str, tmp_path: Path):
    """Also where PEFT takes names of linear layers for those of experts (`misread`)."""
    base = BY_NAME[name]
    plain, inputs = wide(base)
    targets = misread(base) or kinds(base, "all-linear")
    if language_part(plain):
        targets = resolved(base, "all-linear")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(plain, config).double().eval()
    theirs.save_pretrained(tmp_path)
    ours = LoraModel.from_pretrained(wide(base)[0], tmp_path).double()
    torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), **CLOSE)


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
    for name in ("Falcon-H1", "Qwen 3.5"):
        with pytest.raises(InputError, match=r"conv1d, whose weight its mixer reads"):
            adapted(BY_NAME[name], target_modules=["q_proj", "conv1d"])


def test_layers_of_indexers_are_in_no_preset_and_named_where_they_are_asked_for():
    assert not any("indexer" in path for path in resolved(BY_NAME["GLM-5"], "all-linear"))
    with pytest.warns(UserWarning, match=r"2 layers of indexers .* stay as they start"):
        adapted(BY_NAME["GLM-5"], target_modules=["o_proj", "wk"])


@pytest.mark.parametrize(("name", "router"), [("Llama 4", "router"), ("DeepSeek V4", "o_a_proj")])
def test_a_subclass_of_linear_layers_that_computes_something_else_is_no_target(name, router):
    assert not any(path.endswith(router) for path in resolved(BY_NAME[name], "all-linear"))
    with pytest.raises(InputError, match="LoRA applies to linear, embedding"):
        adapted(BY_NAME[name], target_modules=[router])


def test_attention_means_every_mixer_of_tokens_in_a_hybrid_model():
    found = {path.split(".", 3)[3] for path in resolved(BY_NAME["Qwen 3.5"], "attention")}
    linear = {f"linear_attn.{n}" for n in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")}
    full = {f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert found == linear | full | {"linear_attn.out_proj"}


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


def resolved(base: BaseModel, preset: str) -> list[str]:
    """The paths of what `preset` adapts."""
    model = base.build()
    config = LoraConfig(target_modules=preset, **base.trained_whole)
    config.modules_to_save = [*(config.modules_to_save or []), *task_heads(model, config)] or None
    return resolve_targets(model, config)


def kinds(base: BaseModel, preset: str) -> list[str]:
    """The endings of the names of what `preset` adapts, or their last parts in a language part."""
    model, found = base.build(), resolved(base, preset)
    written = written_targets(found, model)
    if isinstance(written, list):
        return written
    return list(dict.fromkeys(path.rpartition(".")[2] for path in found))


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
    if language_part(model):
        notes.append("language part alone")
    if experts := expert_parameters(model):
        names = dict.fromkeys(".".join(name.split(".")[-2:]) for name in experts)
        notes.append("experts: " + ", ".join(f"`{name}`" for name in names))
    if names := misread(base):
        notes.append("misread by PEFT 0.21: " + ", ".join(f"`{name}`" for name in names))
    if base.name in FIXED:
        notes.append("takes no new tokens")
    if base.trained_whole:
        notes.append("head trained whole")
    elif (head := model.get_output_embeddings()) is not None:
        tied = head.weight is model.get_input_embeddings().weight
        notes.append("head and embedding tied" if tied else "head apart")
    lines = "–"
    if base.is_causal:
        reason = take_lines(model)
        lines = "yes" if reason is None else reason.removeprefix(f"{base.kind} ")
    cells = [base.name, f"`{base.kind}`", *shown, lines, "; ".join(notes)]
    return f"| {' | '.join(cells)} |"


def test_the_table_in_the_documents_names_every_family_and_is_what_was_found_of_some():
    lines = TABLE.lines()
    named = [line.split(" | ")[0].removeprefix("| ") for line in lines if " | `" in line]
    assert named == [*BY_NAME], ANEW
    for name in USUAL:
        assert row(BY_NAME[name]) in lines, ANEW


@pytest.mark.exhaustive
def test_the_table_in_the_documents_is_what_was_found():
    headings = (
        "| model | class | attention-minimal | attention: and | all-linear: and | padding-free "
        "| besides |"
    )
    rule = "| --- | --- | --- | --- | --- | --- | --- |"
    TABLE.is_made_of([headings, rule, *map(row, BASE_MODELS)])
