"""What data gives an adapter to start from: PEFT 0.21's values, from a model left as it was."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from lorakit import LoraConfig, get_peft_model
from lorakit.errors import InputError
from lorakit.lora.init.corda import corda, input_covariances
from lorakit.lora.init.eva import EvaConfig, IncrementalSVD, eva, redistribute_ranks
from lorakit.lora.init.lora_ga import lora_ga, weight_gradients

R, SCALING = 3, 2.0
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
PADDED = 4

Batch = dict[str, torch.Tensor]
Collector = Callable[..., dict[str, torch.Tensor]]


def make_batches(n: int = 3, rows: int = 4, seed: int = 0) -> list[Batch]:
    """Batches of token numbers, the first row padded, and labels that leave out the prompts."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(n):
        ids = torch.randint(0, 40, (rows, 24), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -PADDED:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :5] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def targets(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in names}


def runner(model: nn.Module) -> Callable[[Batch], Any]:
    return lambda batch: model(**batch).loss


@pytest.fixture
def model(build) -> nn.Module:
    """Inputs of very different spread, so that ranks are dealt out unevenly."""
    model = build().float()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.copy_(torch.logspace(0, 2, 16))
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


# --- EVA ------------------------------------------------------------------------------------


def by_input(found: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """The ranks of the modules that share an input, sorted: which of them is first is chance."""
    ranks: dict[str, list[int]] = {}
    for name, A in found.items():
        path, _, last = name.rpartition(".")
        shared = path if last in ("q_proj", "k_proj", "v_proj") else name
        ranks[shared] = sorted([*ranks.get(shared, []), len(A)])
    return ranks


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rho": 1.0},
        {"rho": 1.4, "tau": 0.9},
        {"use_label_mask": False},
        {"label_mask_value": 7, "tau": 0.95},
    ],
    ids=str,
)
@pytest.mark.parametrize("patterns", [{}, {"o_proj": 1, "v_proj": 5}], ids=str)
def test_eva_has_pefts_ranks_and_directions(model, fields: dict[str, Any], patterns):
    config = peft.LoraConfig(
        r=R,
        target_modules=NAMES,
        init_lora_weights="eva",
        rank_pattern=patterns,
        eva_config=peft.EvaConfig(**fields),
    )
    theirs = get_eva_state_dict(
        copy.deepcopy(model), make_batches(), config, show_progress_bar=False
    )
    modules = targets(model, NAMES)
    ranks = {name: patterns.get(name.rpartition(".")[2], R) for name in modules}
    ours = eva(modules, make_batches(), runner(model), ranks, EvaConfig(**fields), model=model)
    assert by_input(ours) == by_input(theirs)
    assert sum(len(A) for A in ours.values()) == sum(ranks.values())
    for name, A in ours.items():
        both = min(len(A), len(theirs[name]))
        assert A.dtype == torch.float32
        torch.testing.assert_close(A[:both], theirs[name][:both].float(), rtol=0, atol=1e-4)
    if fields.get("rho") != 1:
        assert len({len(A) for A in ours.values()}) > 2


def test_whitened_components_are_pefts(model):
    # PEFT whitens what modules share once for each of them; here every module is the only one.
    names = ["q_proj", "o_proj", "down_proj"]
    config = peft.LoraConfig(
        r=R,
        target_modules=names,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(whiten=True),
    )
    theirs = get_eva_state_dict(
        copy.deepcopy(model), make_batches(), config, show_progress_bar=False
    )
    modules = targets(model, names)
    settings = EvaConfig(whiten=True)
    ours = eva(modules, make_batches(), runner(model), dict.fromkeys(modules, R), settings)
    assert {n: len(A) for n, A in ours.items()} == {n: len(A) for n, A in theirs.items()}
    for name, A in ours.items():
        torch.testing.assert_close(A, theirs[name].float(), rtol=1e-3, atol=1e-5)


def test_modules_with_one_input_have_the_same_directions_whitened_once(model):
    modules = targets(model.model.layers[0], NAMES)
    for whiten in (False, True):
        config = EvaConfig(rho=1, whiten=whiten)
        found = eva(modules, make_batches(), runner(model), dict.fromkeys(modules, R), config)
        assert torch.equal(found["self_attn.q_proj"], found["self_attn.k_proj"])
        assert torch.equal(found["self_attn.q_proj"], found["self_attn.v_proj"])
        assert not torch.equal(found["self_attn.q_proj"], found["self_attn.o_proj"])
        found["self_attn.q_proj"].zero_()
        assert found["self_attn.k_proj"].any()


def test_evas_components_span_what_the_whole_data_varies_in(model):
    """One pass over an iterator, float64, against one decomposition of all rows."""
    model = model.double()
    module = model.model.layers[1].mlp.down_proj
    rows: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    for batch in make_batches(8):
        model(**batch)
        counted = batch["labels"] != -100
        rows[-1] = rows[-1][counted].detach()
    handle.remove()
    X = torch.cat(rows)
    _, _, Vh = torch.linalg.svd(X - X.mean(dim=0), full_matrices=False)
    given = {"down": module}, iter(make_batches(8)), runner(model), {"down": 12}
    with pytest.warns(UserWarning, match="EVA has not settled for down: give more batches"):
        A = eva(*given, EvaConfig(rho=1, tau=1))["down"]
    assert A.dtype == torch.float64
    torch.testing.assert_close(A @ A.T, torch.eye(12).double(), rtol=0, atol=1e-9)
    cosines = (A * Vh[:12]).sum(dim=1).abs()
    assert cosines[:3].min() > 0.99


def test_padding_and_prompts_do_not_count_for_eva(model):
    batches = make_batches()
    other = copy.deepcopy(batches)
    for batch in other:
        batch["input_ids"][0, -PADDED:] = 3
    modules = targets(model, NAMES)
    ranks = dict.fromkeys(modules, R)
    first, second = (eva(modules, b, runner(model), ranks) for b in (batches, other))
    for name, A in first.items():
        torch.testing.assert_close(A, second[name])


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    d=st.integers(2, 12),
    seed=st.integers(0, 99),
)
def test_an_incremental_decomposition_of_all_directions_is_exact(sizes, d, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [3 + torch.randn(n, d, generator=generator, dtype=torch.float64) for n in sizes]
    svd = IncrementalSVD(d)
    for part in parts:
        svd.update(part)
    X = torch.cat(parts)
    assert svd.count == len(X)
    if len(X) < 2:
        assert len(svd.components) == 0
        return
    centred = X - X.mean(dim=0)
    S = torch.linalg.svdvals(centred)
    torch.testing.assert_close(svd.mean, X.mean(dim=0))
    torch.testing.assert_close(svd.scatter, centred.square().sum())
    torch.testing.assert_close(
        svd.singular_values, S[: len(svd.singular_values)], rtol=0, atol=1e-9
    )
    torch.testing.assert_close(svd.explained_variance_ratio.sum().item(), 1.0)


@given(
    ratios=st.dictionaries(
        st.text("abcde", min_size=1, max_size=3),
        st.lists(st.integers(0, 9), max_size=6).map(lambda r: sorted(r, reverse=True)),
        min_size=1,
    ),
    budget=st.integers(0, 40),
)
def test_ranks_go_to_the_components_that_explain_most(ratios, budget):
    ranks = redistribute_ranks({n: torch.tensor(r) / 9 for n, r in ratios.items()}, budget)
    assert ranks.keys() == ratios.keys()
    assert sum(ranks.values()) == min(budget, sum(len(r) for r in ratios.values()))
    taken = [value for n, r in ratios.items() for value in r[: ranks[n]]]
    left = [value for n, r in ratios.items() for value in r[ranks[n] :]]
    assert min(taken, default=9) >= max(left, default=0)


# --- CorDA ----------------------------------------------------------------------------------


def test_covariances_are_means_over_the_batches(model):
    module = model.lm_head
    batches = make_batches(2, rows=1)
    found = input_covariances({"lm_head": module}, batches, runner(model))["lm_head"]
    expected = torch.zeros(16, 16)
    for batch in batches:
        hidden = model.model(**{k: v for k, v in batch.items() if k != "labels"})[0][0]
        X = hidden[batch["attention_mask"][0].bool()].detach()
        X = X / X.max().abs()
        expected += X.T @ X / 2
    torch.testing.assert_close(found, expected)


def test_modules_with_one_input_share_one_covariance(model):
    modules = targets(model.model.layers[0], NAMES)
    found = input_covariances(modules, make_batches(), runner(model))
    assert found["self_attn.q_proj"] is found["self_attn.v_proj"]
    assert found["self_attn.q_proj"] is not found["self_attn.o_proj"]
    assert found["mlp.down_proj"].shape == (24, 24)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_cordas_factors_are_pefts(build, method: Any, family: str):
    reference = pytest.importorskip("peft.tuners.lora.corda", exc_type=ImportError)  # needs attrs
    model, names = build(family).float(), NAMES if family == "llama" else CONV1D
    batches = make_batches(5, rows=1)
    for batch in batches:
        batch["attention_mask"][:] = 1  # PEFT has no mask here
    modules = targets(model, names)
    covariances = input_covariances(modules, batches, runner(model), model=model)
    config = peft.LoraConfig(
        r=R,
        lora_alpha=R * SCALING,
        target_modules=names,
        fan_in_fan_out=family == "gpt2",
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
    )
    theirs = copy.deepcopy(model)
    reference.preprocess_corda(theirs, config, lambda: [theirs(**b) for b in batches])
    theirs = peft.get_peft_model(theirs, config)
    for name, module in modules.items():
        W = module.weight.T if family == "gpt2" else module.weight
        A, B = corda(W.detach(), covariances[name], R, SCALING, method)
        layer = theirs.base_model.model.get_submodule(name)
        their_A, their_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(B @ A, (their_B @ their_A).detach(), rtol=1e-3, atol=1e-4)
        signs = (A * their_A).sum(dim=1).sign().detach()
        torch.testing.assert_close(signs[:, None] * A, their_A.detach(), rtol=1e-2, atol=1e-3)


# --- LoRA-GA --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_gas_factors_are_pefts_from_gradient_to_factor(build, family: str):
    model, names = build(family).float(), NAMES if family == "llama" else CONV1D
    batches = make_batches()
    if family == "gpt2":
        for m in model.modules():
            m.p = 0.0 if isinstance(m, nn.Dropout) else getattr(m, "p", None)
    modules = targets(model, names)
    gradients = weight_gradients(modules, batches, runner(model), model=model)
    config = peft.LoraConfig(
        r=R,
        lora_alpha=R * SCALING,
        target_modules=names,
        fan_in_fan_out=family == "gpt2",
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(scale="unit"),
    )
    theirs = copy.deepcopy(model)
    preprocess_loraga(theirs, config, lambda: [theirs(**b).loss.backward() for b in batches])
    for name in modules:
        their_gradient = theirs.get_submodule(name)._peft_loraga_grad
        expected = their_gradient.T if family == "gpt2" else their_gradient
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6)
    theirs = peft.get_peft_model(theirs, config)
    for name, module in modules.items():
        W = module.weight.T if family == "gpt2" else module.weight
        A, B = lora_ga(gradients[name], W.detach(), R, SCALING, scale="unit")
        layer = theirs.base_model.model.get_submodule(name)
        their_A, their_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        # Drawn from another state of the generator: the directions are the same up to their sign.
        torch.testing.assert_close(A.T @ A, (their_A.T @ their_A).detach(), rtol=0, atol=1e-3)
        torch.testing.assert_close(B @ B.T, (their_B @ their_B.T).detach(), rtol=1e-3, atol=1e-6)


def test_frozen_weights_have_gradients_and_stay_frozen(model):
    modules = targets(model, ["q_proj"])
    expected = weight_gradients(modules, make_batches(), runner(model))
    model.requires_grad_(False)
    found = weight_gradients(modules, make_batches(), runner(model))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    assert not any(p.requires_grad for p in model.parameters())


# --- all three ------------------------------------------------------------------------------


def collect_eva(modules: dict[str, nn.Module], *args: Any, **kwargs: Any) -> Any:
    return eva(modules, *args, dict.fromkeys(modules, R), **kwargs)


COLLECTORS: dict[str, Collector] = {
    "eva": collect_eva,
    "corda": input_covariances,
    "lora_ga": weight_gradients,
}
every_collector = pytest.mark.parametrize("collect", COLLECTORS.values(), ids=COLLECTORS)


def state(model: nn.Module) -> list[Any]:
    modules = [
        (m.training, len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    parameters = [(p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()]
    return [modules, parameters]


def assert_same(before: list[Any], after: list[Any]) -> None:
    assert before[0] == after[0]
    for (needed, gradient, value), (needed_now, gradient_now, value_now) in zip(
        before[1], after[1], strict=True
    ):
        assert needed == needed_now
        assert gradient is gradient_now
        assert torch.equal(value, value_now)


@every_collector
@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_the_model_comes_out_as_it_went_in(model, collect: Collector, fails: bool):
    model.train()
    model.model.layers[1].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    modules = targets(model, NAMES)
    before = state(model)
    modes = []

    def run(batch: Batch) -> Any:
        modes.append({m.training for m in model.modules()})
        if fails and len(modes) == 3:
            raise KeyboardInterrupt
        return runner(model)(batch)

    if fails:
        with pytest.raises(KeyboardInterrupt):
            collect(modules, make_batches(), run, model=model)
    else:
        collect(modules, make_batches(), run, model=model)
    assert all(mode == {collect is weight_gradients} for mode in modes)
    assert_same(before, state(model))


@every_collector
def test_a_model_that_is_not_given_keeps_its_mode(model, collect: Collector):
    modes = []
    model.train()

    def run(batch: Batch) -> Any:
        modes.append({m.training for m in model.modules()})
        return runner(model)(batch)

    collect(targets(model, NAMES), make_batches(), run)
    assert modes[0] == {True}


@every_collector
def test_layers_with_adapters_give_what_their_base_gives(model, collect: Collector):
    expected = collect(targets(model, NAMES), make_batches(), runner(model))
    config = LoraConfig(r=R, target_modules=NAMES, init_lora_weights=True)
    wrapped = get_peft_model(copy.deepcopy(model), config)
    for layers in (
        targets(wrapped.get_base_model(), NAMES),
        {n: m.base_layer for n, m in targets(wrapped.get_base_model(), NAMES).items()},
    ):
        found = collect(layers, make_batches(), runner(wrapped))
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


@every_collector
def test_half_precision_is_collected_in_float32(model, collect: Collector):
    found = collect(targets(model, NAMES), make_batches(), runner(model.bfloat16()))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


@every_collector
def test_an_iterator_is_gone_through_once(model, collect: Collector):
    seen = []

    def stream() -> Iterator[Batch]:
        for batch in make_batches():
            seen.append(batch)
            yield batch

    modules = targets(model, ["q_proj"])
    found = collect(modules, stream(), runner(model))
    assert found.keys() == modules.keys()
    assert len(seen) <= 3


@every_collector
def test_no_batch_is_an_error(model, collect: Collector):
    with pytest.raises(InputError, match="at least one batch"):
        collect(targets(model, NAMES), [], runner(model))


@every_collector
def test_a_module_that_is_never_reached_is_named(model, collect: Collector):
    modules = {**targets(model, NAMES), "spare": nn.Linear(16, 16)}
    with pytest.raises(InputError, match="no token of the batches reached spare"):
        collect(modules, make_batches(), runner(model))


@every_collector
def test_what_is_not_linear_is_named(model, collect: Collector):
    with pytest.raises(InputError, match=r"model\.embed_tokens is not a linear layer"):
        collect(targets(model, ["embed_tokens"]), make_batches(), runner(model))


@pytest.mark.parametrize("run", [lambda batch: None, lambda batch: torch.tensor(1.0)])
def test_lora_ga_needs_a_loss(model, run: Any):
    with pytest.raises(InputError, match="return the loss"):
        weight_gradients(targets(model, NAMES), make_batches(), run)


def test_batches_without_a_counted_token_are_an_error(model):
    batches = make_batches()
    for batch in batches:
        batch["labels"][:] = -100
    modules = targets(model, ["q_proj"])
    run = lambda batch: model(input_ids=batch["input_ids"])  # noqa: E731
    with pytest.raises(InputError, match="no token of the batches reached"):
        eva(modules, batches, run, dict.fromkeys(modules, R))


@pytest.mark.parametrize("fields", [{"rho": 0.5}, {"tau": 1.5}, {"tau": -0.1}], ids=str)
def test_settings_out_of_range_are_errors(fields: dict[str, float]):
    with pytest.raises(InputError, match=f"eva_config: {next(iter(fields))} must be"):
        EvaConfig(**fields)  # type: ignore[arg-type]
