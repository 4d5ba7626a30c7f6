"""Losses and gradients of the preference objectives are those of TRL's own trainers, to 1e-9.

TRL collates its batch and computes its loss on a PEFT model in float64; the same tokens are given
to lorakit's objective with the same adapter. TRL's fused head and transformers' norm round to
float32 whatever the weights are, so that the same functions in float64 stand in for these two.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig as PeftConfig
from transformers import AutoModelForCausalLM

from lorakit.data.batches import Collator, LineCollator
from lorakit.data.formats import to_sample
from lorakit.data.masking import IGNORE, TokenizedRow
from lorakit.data.preference_tokens import JudgedRow, PairRow, with_mismatched
from lorakit.data.sources import Row
from lorakit.lora import LoraModel
from lorakit.lora.config import LoraConfig
from lorakit.models.lines import take_lines, take_prefixes
from lorakit.objectives.forward import ACTIVE, BASE
from lorakit.objectives.objective import Objective
from lorakit.objectives.registry import make_objective
from tiny import byte_tokenizer, make_attentive
from trl_peer import (
    LORA,
    TEMPLATE,
    assert_same,
    in_float64,
    loss_of_lorakit,
    loss_of_trl,
)

trl = pytest.importorskip("trl")
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402

PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"{n} + {n}? " * (1 + n % 3)}],
        "chosen": [{"role": "assistant", "content": f"It is {2 * n}." + "!" * (3 * n)}],
        "rejected": [{"role": "assistant", "content": "I do not know" + "." * (9 - 2 * n)}],
    }
    for n in range(4)
]
JUDGED = [
    {
        "prompt": pair["prompt"],
        "completion": pair["rejected" if n % 3 else "chosen"],
        "label": not n % 3,
    }
    for n, pair in enumerate(PAIRS)
]


@pytest.fixture(scope="module")
def exact() -> Iterator[None]:
    """Model and TRL in float64 throughout."""
    with in_float64() as patch:  # of EXO's epsilon too
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # of ORPO's odds
        yield


@pytest.fixture(scope="module")
def make(
    exact: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """Makes a trainer of TRL on a tiny model, with an adapter that has learned something."""

    def trainer(kind: Any, config: Any, rows: Sequence[Any], **settings: Any) -> Any:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = TEMPLATE
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
        make_attentive(model)
        args = config(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            per_device_train_batch_size=len(rows),
            max_length=256,
            **settings,
        )
        made = kind(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_list([*rows]),
            processing_class=tokenizer,
            peft_config=PeftConfig(**LORA),
        )
        generator = torch.Generator().manual_seed(1)
        for name, parameter in made.model.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data = 0.1 * values
        return made

    return trainer


@pytest.fixture(scope="module")
def dpo(make: Callable[..., Any]) -> Any:
    return make(trl.DPOTrainer, trl.DPOConfig, PAIRS)


@pytest.fixture(scope="module")
def wpo(make: Callable[..., Any]) -> Any:
    return make(trl.DPOTrainer, trl.DPOConfig, PAIRS, use_weighting=True)


@pytest.fixture(scope="module")
def kto(make: Callable[..., Any]) -> Any:
    return make(trl.KTOTrainer, trl.KTOConfig, JUDGED)


@pytest.fixture(scope="module")
def orpo(make: Callable[..., Any]) -> Any:
    return make(ORPOTrainer, ORPOConfig, PAIRS, max_completion_length=128)


@pytest.fixture(scope="module")
def cpo(make: Callable[..., Any]) -> Any:
    settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "max_completion_length": 128}
    return make(CPOTrainer, CPOConfig, PAIRS, **settings)


@pytest.fixture(scope="module")
def ours(exact: None, dpo: Any, tiny_model: Path) -> LoraModel:
    """The same model and adapter, of lorakit."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    make_attentive(base)
    model = LoraModel(base, LoraConfig(**LORA)).double()
    own, theirs = dict(model.named_parameters()), dict(dpo.model.named_parameters())
    for name, parameter in theirs.items():
        own[name].data = parameter.data.clone()
    assert take_lines(base) is None
    assert take_prefixes(base)
    return model.train()


def batch_of(trainer: Any) -> dict[str, Any]:
    rows = trainer.train_dataset
    return trainer.data_collator([rows[i] for i in range(len(rows))])


def row_of(prompt: Sequence[int], answer: Sequence[int]) -> TokenizedRow:
    ids, labels = [*prompt, *answer], [*[IGNORE] * len(prompt), *answer]
    return TokenizedRow(ids, labels, "rows:1")


def pairs_of(trainer: Any) -> list[TokenizedRow]:
    """TRL's tokens."""
    return [
        PairRow.of(*(row_of(r["prompt_ids"], r[f"{n}_ids"]) for n in ("chosen", "rejected")))
        for r in trainer.train_dataset
    ]


def judged_of(trainer: Any) -> list[TokenizedRow]:
    rows = []
    for row in trainer.train_dataset:
        one = row_of(row["prompt_ids"], row["completion_ids"])
        rows.append(JudgedRow(one.input_ids, one.labels, one.where, desirable=row["label"]))
    return with_mismatched(rows, 256)


PAD = 258
LAYOUTS = {
    "shared prefixes": LineCollator(share_prefixes=True),
    "padding-free": LineCollator(),
    "padded": Collator(PAD),
}


def batches_of(
    objective: Objective, rows: Sequence[TokenizedRow], layout: str, size: int
) -> list[dict[str, torch.Tensor]]:
    collate = LAYOUTS[layout]
    return [objective.to_batch(rows[i : i + size], collate) for i in range(0, len(rows), size)]


DPO = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "beta": 0.7},
    {"loss_type": "sigmoid_norm", "beta": 2.0},
    {"loss_type": "hinge"},
    {"loss_type": "ipo"},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    {"loss_type": "nca_pair"},
    {"loss_type": "bco_pair"},
    {"loss_type": "sppo_hard"},
    {"loss_type": "apo_zero"},
    {"loss_type": "apo_down"},
    {"loss_type": "sigmoid", "ld_alpha": 0.3},
    {"loss_type": ["sigmoid", "apo_zero"], "loss_weights": [0.8, 0.2]},
    {"loss_type": "aot"},
    {"loss_type": "aot", "beta": 0.5, "label_smoothing": 0.2},
    {"loss_type": "aot_unpaired"},
    {"loss_type": ["aot_unpaired", "hinge"], "loss_weights": [1, 0.5], "label_smoothing": 0.1},
    {"loss_type": "discopop"},
    {"loss_type": "discopop", "beta": 0.02, "discopop_tau": 0.1},
    *(
        {"loss_type": loss_type, "f_divergence_type": divergence}
        for loss_type in ("sigmoid", "ipo")
        for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
    {
        "loss_type": ["hinge", "sigmoid_norm", "discopop"],
        "loss_weights": [1, 2, 0.5],
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 1.7,
    },
]


@pytest.mark.parametrize("settings", DPO, ids=str)
def test_dpo_has_trls_loss_and_gradients(
    settings: dict[str, Any], dpo: Any, ours: LoraModel, monkeypatch: pytest.MonkeyPatch
):
    names = settings["loss_type"]
    dpo.loss_types = [names] if isinstance(names, str) else names
    dpo.loss_weights = settings.get("loss_weights", [1.0])
    dpo.beta, dpo.ld_alpha = settings.get("beta", 0.1), settings.get("ld_alpha")
    dpo.label_smoothing = settings.get("label_smoothing", 0.0)
    dpo.args.discopop_tau = settings.get("discopop_tau", 0.05)
    dpo.f_alpha_divergence_coef = settings.get("f_alpha_divergence_coef", 0.5)
    monkeypatch.setattr(dpo, "f_divergence_type", settings.get("f_divergence_type", "reverse_kl"))
    if dpo.f_divergence_type == "alpha_divergence":  # TRL knows no limit of exponents in float64
        monkeypatch.setattr(torch, "float32", torch.float64)
    theirs = loss_of_trl(dpo, batch_of(dpo))
    monkeypatch.undo()
    objective = make_objective({"type": "dpo", **settings})
    # Losses that sort need the whole step, however it is divided.
    for size in (4, 1) if objective.needs_all_batches else (4,):
        batches = batches_of(objective, pairs_of(dpo), "shared prefixes", size)
        assert_same(loss_of_lorakit(ours, objective, batches), theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "sigmoid"},
        # TRL weighs in place, which hinge's gradient does not survive.
        {"loss_type": ["sigmoid_norm", "apo_zero"], "loss_weights": [0.8, 0.3], "ld_alpha": 0.5},
    ],
    ids=str,
)
def test_weighted_pairs_have_trls_loss_and_gradients(
    settings: dict[str, Any], wpo: Any, ours: LoraModel
):
    names = settings["loss_type"]
    wpo.loss_types = [names] if isinstance(names, str) else names
    wpo.loss_weights = settings.get("loss_weights", [1.0])
    wpo.ld_alpha = settings.get("ld_alpha")
    theirs = loss_of_trl(wpo, batch_of(wpo))
    objective = make_objective({"type": "dpo", "use_weighting": True, **settings})
    plain = make_objective({"type": "dpo", **settings})
    for layout, size in (("shared prefixes", 4), ("padded", 2)):
        batches = batches_of(objective, pairs_of(wpo), layout, size)
        assert_same(loss_of_lorakit(ours, objective, batches), theirs)
    assert abs(loss_of_lorakit(ours, plain, batches)[0] - theirs[0]) > 1e-3


def test_the_cross_entropy_beside_dpo_is_trls_of_one_pair(dpo: Any, ours: LoraModel):
    dpo.loss_types, dpo.loss_weights, dpo.beta = ["sigmoid", "sft"], [1.0, 0.5], 0.1
    dpo.ld_alpha, dpo.label_smoothing = None, 0.0
    settings = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    objective = make_objective({"type": "dpo", **settings})
    for i, pair in enumerate(pairs_of(dpo)):  # of several, TRL has the mean over all tokens
        theirs = loss_of_trl(dpo, dpo.data_collator([dpo.train_dataset[i]]))
        batches = batches_of(objective, [pair], "padded", 1)
        assert_same(loss_of_lorakit(ours, objective, batches), theirs)


def test_tokens_of_pairs_and_judged_answers_are_trls(dpo: Any, kto: Any):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for name, rows, trainer, theirs in (
        ("dpo", PAIRS, dpo, pairs_of(dpo)),
        ("kto", JUDGED, kto, judged_of(kto)),
    ):
        objective = make_objective(name)
        samples = [to_sample(Row(r, Path("f"), 1), {}, objective.row_kinds) for r in rows]
        own = objective.together([objective.tokenize(s, tokenizer, 256) for s in samples], 256)
        for one, other in zip(own, theirs, strict=True):
            assert one.input_ids == other.input_ids, (name, trainer)
            assert one.labels == other.labels


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.5},
        {"loss_type": "apo_zero_unpaired"},
    ],
    ids=str,
)
@pytest.mark.parametrize("sign", [1.0, -1.0])  # one of them has an estimate of the KL above 0
def test_kto_has_trls_loss_and_gradients(
    settings: dict[str, Any], sign: float, kto: Any, ours: LoraModel
):
    kto.beta, kto.loss_type = settings.get("beta", 0.1), settings.get("loss_type", "kto")
    kto.calculate_KL = kto.loss_type == "kto"
    kto.desirable_weight = settings.get("desirable_weight", 1.0)
    kto.undesirable_weight = settings.get("undesirable_weight", 1.0)
    models = (kto.model, ours)
    for model in models:
        scale_b(model, sign)
    try:
        theirs = loss_of_trl(kto, batch_of(kto))
        objective = make_objective({"type": "kto", **settings})
        for size in (4, 1):
            batches = batches_of(objective, judged_of(kto), "shared prefixes", size)
            assert_same(loss_of_lorakit(ours, objective, batches), theirs)
    finally:
        for model in models:
            scale_b(model, sign)


def scale_b(model: Any, factor: float) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= factor


def pairs_of_labels(batch: dict[str, torch.Tensor]) -> list[TokenizedRow]:
    """The tokens of a batch of TRL's older trainers."""
    rows = []
    for i in range(len(batch["chosen_input_ids"])):
        parts = []
        for name in ("chosen", "rejected"):
            kept = batch[f"{name}_attention_mask"][i].bool()
            ids = batch[f"{name}_input_ids"][i][kept].tolist()
            labels = batch[f"{name}_labels"][i][kept].tolist()
            parts.append(TokenizedRow(ids, labels, "rows:1"))
        rows.append(PairRow.of(*parts))
    return rows


@pytest.mark.parametrize(
    "settings", [{}, {"beta": 1.3, "simpo_gamma": 1.0}, {"label_smoothing": 0.2}], ids=str
)
def test_simpo_has_the_loss_and_gradients_of_trls_cpo(
    settings: dict[str, Any], cpo: Any, ours: LoraModel
):
    cpo.beta, cpo.simpo_gamma = settings.get("beta", 2.0), settings.get("simpo_gamma", 0.5)
    cpo.label_smoothing = settings.get("label_smoothing", 0.0)
    batch = batch_of(cpo)
    theirs = loss_of_trl(cpo, batch)
    objective = make_objective({"type": "simpo", **settings})
    batches = batches_of(objective, pairs_of_labels(batch), "shared prefixes", 4)
    assert_same(loss_of_lorakit(ours, objective, batches), theirs)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo_has_the_papers_loss_of_trls_parts(beta: float, orpo: Any, ours: LoraModel):
    """TRL's first term is over the prompt too; the paper's is the mean of the answer's tokens."""
    orpo.beta = beta
    batch = batch_of(orpo)
    orpo.model.zero_grad()
    chosen, rejected, *_ = orpo.concatenated_forward(orpo.model, batch)
    loss = (-chosen - orpo.odds_ratio_loss(chosen, rejected)[0]).mean()
    loss.backward()
    gradients = {n: p.grad for n, p in orpo.model.named_parameters() if p.grad is not None}
    objective = make_objective({"type": "orpo", "beta": beta})
    batches = batches_of(objective, pairs_of_labels(batch), "shared prefixes", 4)
    assert_same(loss_of_lorakit(ours, objective, batches), (loss.item(), gradients))


def test_orpo_has_trls_whole_loss_of_a_pair_with_one_token_before_the_answer(
    orpo: Any, ours: LoraModel
):
    orpo.beta = 0.1
    [pair, *_] = pairs_of_labels(batch_of(orpo))
    begins = [next(i for i, x in enumerate(p.labels) if x != IGNORE) for p in pair.sequences]
    parts = [
        TokenizedRow([257, *p.input_ids[b:]], [IGNORE, *p.labels[b:]], "rows:1")
        for p, b in zip(pair.sequences, begins, strict=True)
    ]
    batch = {}
    for name, part in zip(("chosen", "rejected"), parts, strict=True):
        batch[f"{name}_input_ids"] = torch.tensor([part.input_ids])
        batch[f"{name}_attention_mask"] = torch.ones(1, len(part), dtype=torch.int64)
        batch[f"{name}_labels"] = torch.tensor([part.labels])
    theirs = loss_of_trl(orpo, batch)
    objective = make_objective("orpo")
    batches = batches_of(objective, [PairRow.of(*parts)], "padded", 1)
    assert_same(loss_of_lorakit(ours, objective, batches), theirs)


@pytest.mark.parametrize("name", ["dpo", "simpo", "orpo", "kto"])
def test_however_rows_are_laid_out_and_divided_the_step_is_the_same(
    name: str, dpo: Any, kto: Any, ours: LoraModel
):
    objective = make_objective(name)
    rows = judged_of(kto) if name == "kto" else pairs_of(dpo)
    first = loss_of_lorakit(ours, objective, batches_of(objective, rows, "padded", 4))
    for layout, size in (("shared prefixes", 2), ("padding-free", 4), ("padded", 1)):
        other = loss_of_lorakit(ours, objective, batches_of(objective, rows, layout, size))
        assert_same(other, first)


def test_the_first_loss_of_dpo_is_ln_2(dpo: Any, ours: LoraModel):
    objective = make_objective("dpo")
    [batch] = batches_of(objective, pairs_of(dpo), "shared prefixes", 4)
    scale_b(ours, 0.0)
    try:
        with torch.no_grad():
            loss = objective.loss(objective.forward(ours), batch)
    finally:
        with torch.no_grad():
            theirs = dict(dpo.model.named_parameters())
            for key, parameter in ours.named_parameters():
                parameter.copy_(theirs[key])
    assert abs(float(loss.total) / 4 - torch.tensor(2.0).log().item()) < 1e-12


def test_the_reference_is_the_same_in_the_policys_pass_and_draws_no_dropout(
    dpo: Any, ours: LoraModel
):
    objective = make_objective("dpo")
    [batch] = batches_of(objective, pairs_of(dpo), "shared prefixes", 4)
    forward = objective.forward(ours)
    policy, together = forward.token_log_probabilities(batch, (ACTIVE, BASE))
    alone = forward.of_reference(batch, BASE)
    assert (together - alone).abs().max() < 1e-9
    assert (policy - alone).abs().max() > 1e-3
    assert not alone.requires_grad
    ours.get_base_model().config.attention_dropout = 0.5
    for layer in ours.get_base_model().model.layers:
        layer.self_attn.attention_dropout = 0.5
    try:
        assert (forward.of_reference(batch, BASE) - alone).abs().max() < 1e-9
        assert ours.training
    finally:
        ours.get_base_model().config.attention_dropout = 0.0
        for layer in ours.get_base_model().model.layers:
            layer.self_attn.attention_dropout = 0.0


def test_the_reference_may_be_an_adapter_that_is_not_trained(dpo: Any, tiny_model: Path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    make_attentive(base)
    model = LoraModel(base, LoraConfig(**LORA)).double()
    model.add_adapter("start", LoraConfig(**LORA))
    theirs = dict(dpo.model.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = theirs[name.replace(".start.", ".default.")].data.clone()
    objective: Any = make_objective("dpo")
    [batch] = batches_of(objective, pairs_of(dpo), "padded", 4)
    with torch.no_grad():
        from_base = float(objective.loss(objective.forward(model), batch).total) / 4
        objective.reference = "start"
        from_start = float(objective.loss(objective.forward(model), batch).total) / 4
    assert abs(from_start - torch.tensor(2.0).log().item()) < 1e-12
    assert abs(from_base - from_start) > 1e-3
