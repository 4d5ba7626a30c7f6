"""Packed factors: the same product as each adapter alone, whoever comes and goes."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorakit
from families import make_gpt2, make_llama, make_tied
from lorakit.engine.adapter_reader import structure_of
from lorakit.errors import InputError
from lorakit.lora import LoraModel
from lorakit.lora.checkpoint import load_tensors
from lorakit.lora.joining import parts_of
from lorakit.lora.packed import same_inputs
from lorakit.lora.routing import BASE, Route
from lorakit.lora.wrapping import wrapped_modules

IDS = torch.arange(12).view(4, 3)
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def factors(model: nn.Module, seed: int, *ranks: int) -> Factors:
    """Random factors for every linear layer, of ranks that go round; 0 leaves a layer out."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    linear = [p for p, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    for at, path in enumerate(p for p in linear if "lm_head" not in p):
        if r := ranks[at % len(ranks)]:
            d_out, d_in = _shape(model.get_submodule(path))
            A = torch.randn(r, d_in, generator=generator, dtype=torch.float64)
            B = torch.randn(d_out, r, generator=generator, dtype=torch.float64)
            found[path] = A, B
    return found


def config_of(change: Factors, **options: Any) -> lorakit.LoraConfig:
    """For these modules, each with its rank, and a scaling of 1."""
    ranks = {f"^{path}": len(A) for path, (A, _) in change.items()}
    return lorakit.LoraConfig(
        target_modules=list(change), rank_pattern=ranks, alpha_pattern=ranks, **options
    )


def add(bank: LoraModel, name: str, change: Factors, **options: Any) -> None:
    tensors = {
        f"base_model.model.{path}.lora_{factor}.weight": tensor
        for path, pair in change.items()
        for factor, tensor in zip("AB", pair, strict=True)
    }
    bare = structure_of(vars(bank)["bare"])
    alone = LoraModel(bare, config_of(change, **options), "alone", initialize=False)
    load_tensors(alone.adapter_tensors("alone"), tensors, name)
    bank.add_packed(name, alone.peft_config["alone"], parts_of(bare, "alone"))


def packed(model: Any, together: bool, held: bool = False) -> LoraModel:
    families = same_inputs(model, lambda: model(IDS)) if together else ()
    bare = structure_of(model)
    bank = LoraModel(model, None)
    vars(bank)["bare"] = bare  # in no submodule
    bank.pack(families)
    if held:
        assert bank.packed is not None
        bank.packed.hold(families)
    return bank


def _shape(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.nf, layer.weight.shape[0]


def logits(model: Any) -> list[torch.Tensor]:
    """Of rows with several tokens, and with one, which are multiplied in different forms."""
    return [model(IDS).logits, model(IDS[:, :1]).logits]


def with_weights(model: Any, change: Factors) -> list[torch.Tensor]:
    """The logits with B A added to the weights themselves."""
    weights = {path: model.get_submodule(path).weight for path in change}
    before = {path: weight.data.clone() for path, weight in weights.items()}
    for path, (A, B) in change.items():
        turned = isinstance(model.get_submodule(path), Conv1D)
        weights[path].data += (B @ A).T if turned else B @ A
    try:
        return logits(model)
    finally:
        for path, weight in weights.items():
            weight.data = before[path]


@pytest.fixture(autouse=True)
def memory_that_nobody_filled_is_not_a_number() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[make_llama, make_gpt2, make_tied])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param().double().eval()


@pytest.mark.parametrize(("together", "held"), [(False, False), (True, False), (True, True)])
@torch.no_grad()
def test_each_row_gets_its_own_adapters_product(model: Any, together: bool, held: bool):
    made = {"a": factors(model, 1, 3), "b": factors(model, 2, 1, 5, 0), "c": factors(model, 3, 2)}
    expected = {name: with_weights(model, change) for name, change in made.items()}
    expected[None] = logits(model)  # type: ignore[index]
    bank = packed(model, together, held)

    def check(*names: str | None) -> None:
        bank.routing.route = Route.of_rows([name or BASE for name in names])
        for form, found in enumerate(logits(model)):
            for row, name in enumerate(names):
                wanted = expected[name][form][row]  # type: ignore[index]
                assert torch.allclose(found[row], wanted, rtol=0, atol=1e-10)

    add(bank, "b", made["b"])
    check("b", "b", None, "b")
    add(bank, "a", made["a"])  # for layers too that b has nothing for
    check("a", "a", "a", "a")
    check("a", None, "b", None)
    add(bank, "c", made["c"])
    check("a", "b", None, "c")
    check("a", "b", "b", "a")
    check("b", "b", "b", "b")
    check(None, None, None, None)
    bank.delete_adapter("b")  # a gap between two that stay
    check("c", "a", "c", None)
    add(bank, "b2", made["c"])
    expected["b2"] = expected["c"]
    check("b2", "a", "c", "b2")
    bank.delete_adapter("a")
    add(bank, "b", made["b"])  # wider than the gap
    check("b", "b2", None, "c")
    for _, layer in wrapped_modules(model):
        layer.set_scale("b", 0.0)  # packed before, and as it is now
    expected["b"] = expected[None]  # type: ignore[index]
    check("b", "b2", None, "c")
    check("b", "b", "b", "b")
    bank.routing.route = Route()
    for name in ("b", "b2", "c"):
        bank.delete_adapter(name)
    assert not list(wrapped_modules(model))
    check(None, None, None, None)


@torch.no_grad()
@torch.no_grad()
def test_weights_beside_each_other_are_in_memory_once_and_part_again():
    torch.manual_seed(0)
    model: Any = make_llama().double().eval()
    expected = logits(model)
    bank = packed(model, together=True, held=True)
    attention = model.model.layers[0].self_attn
    parts = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
    assert len({weight.untyped_storage().data_ptr() for weight in parts}) == 1
    assert parts[0].untyped_storage().nbytes() == sum(weight.nbytes for weight in parts)
    for found, wanted in zip(logits(model), expected, strict=True):
        assert torch.equal(found, wanted)
    bank.unpack()
    for weight in parts:
        assert weight.untyped_storage().nbytes() == weight.nbytes


def test_a_weight_that_several_modules_share_stays_theirs(model: Any):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bank = packed(model, True)
    add(bank, "a", factors(model, 1, 4))
    bank.routing.route = Route.of_rows(["a", BASE, "a", "a"])
    model(IDS)
    names = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert {name for name in names if "lora_" not in name} == before.keys()
    assert all(torch.equal(names[name], value) for name, value in before.items())


def test_gradients_flow_through_the_layers_of_a_packed_bank(model: Any):
    """What is packed is a copy for inference; with gradients the layers compute as ever."""
    change = factors(model, 1, 2)
    bank = packed(model, True)
    add(bank, "a", change)
    bank.set_adapter("a")
    bank(IDS).logits.sum().backward()
    assert all(t.grad is not None for t in bank.adapter_tensors("a").values())


def test_a_layer_that_gets_some_of_the_tokens_alone_is_refused(model: Any):
    bank = packed(model, False)
    add(bank, "a", factors(model, 1, 2))
    bank.routing.route = Route(rows=("a", BASE, "a", BASE), shape=(4, 3))
    layer = next(m for _, m in wrapped_modules(model))
    with pytest.raises(InputError, match="cannot be told whose they are"), torch.no_grad():
        layer(torch.zeros(8, layer.in_features, dtype=torch.float64))


def test_memory_that_ends_while_an_adapter_is_added_leaves_the_others_right(
    monkeypatch: pytest.MonkeyPatch,
):
    model: Any = make_llama().double().eval()
    bank = packed(model, True)
    made = {n: factors(model, n, n) for n in (2, 3, 9)}
    expected = {n: with_weights(model, change)[0] for n, change in made.items()}
    assert bank.packed is not None
    empty, left = bank.packed.empty, 10**9

    def scarce(*shape: int, **options: Any) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise MemoryError
        return empty(*shape, **options)

    monkeypatch.setattr(bank.packed, "empty", scarce)
    add(bank, "n2", made[2])
    for limit in range(6):  # the allocation that fails is one after the other
        left = limit
        with pytest.raises(MemoryError):
            add(bank, "n9", made[9])
        assert "n9" not in bank.packed
        assert bank.adapters == ["n2"]
        left = 10**9
        add(bank, "n3", made[3])
        for number in (2, 3):
            bank.routing.route = Route.of_rows([f"n{number}"])
            with torch.no_grad():
                torch.testing.assert_close(model(IDS).logits, expected[number])
        bank.routing.route = Route()
        bank.delete_adapter("n3")


class Others(nn.Module):
    """Modules of the kinds that language models seldom have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 9)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).mT).mT
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


@torch.no_grad()
def test_parts_of_every_kind_join_another_model_and_leave_it():
    torch.manual_seed(0)
    model = Others().double().eval()
    bare, ids = structure_of(model), torch.arange(8).view(4, 2)
    configs = {
        "all": {"target_modules": ["conv", "attention", "embed"], "modules_to_save": ["head"]},
        "dora": {"target_modules": ["conv", "head"], "use_dora": True},
        "pissa": {"target_modules": ["head", "attention"], "init_lora_weights": "pissa"},
        "parameter": {"target_parameters": ["head.weight"], "trainable_token_indices": [1, 3]},
    }
    expected, parts = [], {}
    for name, options in configs.items():
        own = structure_of(bare)
        alone = LoraModel(own, lorakit.LoraConfig(r=2, **({"target_modules": []} | options)), name)
        for tensor in alone.adapter_tensors(name).values():
            tensor.normal_()
        expected.append(alone(ids))
        parts[name] = alone.peft_config[name], parts_of(own, name)
    before = model(ids)
    bank = LoraModel(model, None)
    bank.pack()
    for order in (list(configs), list(reversed(configs))):
        for name in order:
            bank.add_packed(name, *parts[name])
        for name, outputs in zip(configs, expected, strict=True):
            bank.routing.route = Route.of_rows([name] * len(ids))
            torch.testing.assert_close(model(ids), outputs, rtol=0, atol=1e-10)
        bank.routing.route = Route.of_rows(list(configs))
        rows = torch.stack([outputs[at] for at, outputs in enumerate(expected)])
        torch.testing.assert_close(model(ids), rows, rtol=0, atol=1e-10)
        bank.routing.route = Route()
        for name in order:
            bank.delete_adapter(name)
        assert not list(wrapped_modules(model))
        assert torch.equal(model(ids), before)


@torch.no_grad()
def test_an_adapter_that_trains_whole_what_another_adapts_within_cannot_join(model: Any):
    bank = packed(model, True)
    path = next(p for p, _ in model.named_modules() if p.endswith((".mlp", ".ffn")))
    change = {p: pair for p, pair in factors(model, 1, 2).items() if p.startswith(path)}
    add(bank, "a", change)
    bare = structure_of(vars(bank)["bare"])
    config = lorakit.LoraConfig(target_modules="all-linear", modules_to_save=[path])
    LoraModel(bare, config, "whole")
    with pytest.raises(InputError, match="cannot both be adapted"):
        bank.add_packed("whole", config, parts_of(bare, "whole"))
    assert bank.adapters == ["a"]
