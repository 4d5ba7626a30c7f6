"""Rows in one line are computed as if each were alone, or the model is refused."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from lorakit.data.batches import Collator, LineCollator
from lorakit.data.masking import TokenizedRow
from lorakit.models.lines import take_lines, take_prefixes
from lorakit.models.loss import SupervisedLoss
from lorakit.models.row_attention import NAME, row_attention
from lorakit.models.short_rows import ShortRowsAttention, in_groups, plan_of
from lorakit.models.varlen import all_rows
from models.small import SMALL


def build(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SMALL)).double()
    if kind == "mistral":  # a window shorter than the rows
        return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=3)).double()
    if kind == "gemma2":  # softcapped scores, and a window in every other layer
        config = Gemma2Config(**SMALL, head_dim=4, sliding_window=3, attn_logit_softcapping=2.0)
        return Gemma2ForCausalLM(config).double()
    if kind == "gpt-oss":  # sinks, and a window in every other layer
        config = GptOssConfig(**SMALL, head_dim=4, sliding_window=3, num_local_experts=4)
        config._experts_implementation = "eager"
        model = GptOssForCausalLM(config).double()
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
        return model
    config = GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config).double().eval()  # it has dropout


def row(*ids: int) -> TokenizedRow:
    return TokenizedRow(list(ids), [-100, -100, *ids[2:]], "here")


def row_behind(*ids: int) -> TokenizedRow:
    """A row behind what many begin with, of which the last token and those after are its own."""
    prompt = [*range(1, 20), ids[0]]
    return TokenizedRow([*prompt, *ids[1:]], [-100] * len(prompt) + [*ids[1:]], "here")


ROWS = [row(5, 6, 7, 8, 9), row(11, 3, 12, 13, 14, 15, 16, 17), row(20, 21, 22)]


def losses_and_gradients(model: Any, batches: list[dict]) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    loss = SupervisedLoss(model)
    total = sum(loss(model, batch)[0] for batch in batches)
    assert isinstance(total, torch.Tensor)
    total.backward()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2", "gpt-oss"])
def test_a_line_a_padded_batch_and_single_rows_have_one_loss_and_one_gradient(kind: str):
    model = build(kind)
    if kind == "gemma2":  # SDPA has no softcapping: the plain form is the reference
        model.set_attn_implementation("eager")
    pad = Collator(pad_token_id=0, pad_to_multiple_of=1)
    padded = losses_and_gradients(model, [pad(ROWS)])
    single = losses_and_gradients(model, [pad([r]) for r in ROWS])
    assert take_lines(model) is None
    line = losses_and_gradients(model, [LineCollator()(ROWS)])
    # Eager attention rounds its softmax to float32.
    close = {"rtol": 1e-4, "atol": 1e-5} if kind == "gemma2" else {"rtol": 1e-9, "atol": 1e-11}
    # Padding behind a window's reach has nothing to see, which eager attention makes NaN.
    for found in (single,) if kind == "gemma2" else (padded, single):
        torch.testing.assert_close(line[0], found[0], **close)
        assert line[1].keys() == found[1].keys()
        for name, gradient in line[1].items():
            torch.testing.assert_close(gradient, found[1][name], **close)


def test_a_row_does_not_depend_on_its_neighbours():
    model = build("llama")
    assert take_lines(model) is None
    loss = SupervisedLoss(model)
    _, middle, _ = ROWS
    only = TokenizedRow(middle.input_ids, middle.labels, "here")
    silent = [TokenizedRow(list(ids), [-100] * len(ids), "") for ids in [(5, 6, 7), (8, 9, 30)]]
    totals = [
        loss(model, LineCollator()([silent[0], only, silent[1]]))[0],
        loss(model, LineCollator()([silent[1], only, silent[0]]))[0],
    ]
    assert torch.equal(totals[0], totals[1])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt-oss"])
def test_without_boundaries_the_model_answers_as_before(kind: str):
    model = build(kind)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    before = model(input_ids=ids, attention_mask=mask).logits
    assert take_lines(model) is None
    after = model(input_ids=ids, attention_mask=mask).logits
    rounding = 1e-6 if kind == "gemma2" else 1e-12  # its own attention has a softmax in float32
    torch.testing.assert_close(after, before, rtol=rounding, atol=rounding)


def test_a_model_with_its_own_attention_is_refused_and_left_as_it_was():
    model = BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=16, n_layer=1, n_head=2))
    before = model.config._attn_implementation
    reason = take_lines(model)
    assert reason is not None
    assert "BloomForCausalLM" in reason
    assert model.config._attn_implementation == before != NAME


LENGTHS, PARENTS = [5, 3, 2, 4, 9, 1], [-1, 0, 0, 2, -1, -1]
"""A prefix with two rows behind it, one of which is continued, and two others."""


def short_rows(window: int | None, dtype: torch.dtype = torch.float64) -> Any:
    begins = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return plan_of(begins, torch.tensor(PARENTS, dtype=torch.int32), window, dtype)


@pytest.mark.parametrize("window", [None, 3])
def test_the_gradient_of_short_rows_is_that_of_their_numbers(window: int | None):
    torch.manual_seed(0)
    q, k, v = (torch.randn(24, h, 2).double().requires_grad_() for h in (4, 2, 2))
    assert torch.autograd.gradcheck(
        ShortRowsAttention.apply, (q, k, v, 0.5, short_rows(window)), fast_mode=True
    )


@pytest.mark.parametrize("window", [None, 3])
def test_short_rows_are_computed_as_one_by_one(window: int | None):
    torch.manual_seed(0)
    q, k, v = (torch.randn(24, h, 4).double() for h in (6, 2, 2))
    plan = short_rows(window)
    assert [group.queries.shape for group in plan.groups] == [(6, 9)]
    found = ShortRowsAttention.apply(q, k, v, 0.5, plan)
    begins = [sum(LENGTHS[:i]) for i in range(7)]
    for i, begin in enumerate(begins[:-1]):
        own = [*range(begin, begins[i + 1])]
        chain, seen = i, own
        while (chain := PARENTS[chain]) >= 0:
            seen = [*range(begins[chain], begins[chain + 1]), *seen]
        one = (x[at].transpose(0, 1) for x, at in ((q, own), (k, seen), (v, seen)))
        hidden = torch.ones(len(own), len(seen)).tril(len(seen) - len(own)).bool()
        if window:
            hidden &= ~torch.ones(len(own), len(seen)).tril(len(seen) - len(own) - window).bool()
        wanted = F.scaled_dot_product_attention(*one, hidden, scale=0.5, enable_gqa=True)
        torch.testing.assert_close(found[own], wanted.transpose(0, 1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("window", [None, 200])
def test_a_line_may_have_short_and_long_rows(window: int | None):
    """In bfloat16 up to 512 tokens are a product, and more are SDPA's, as is all of float32."""
    torch.manual_seed(0)
    lengths = [30, 600, 33, 300, 20]
    begins = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x = [torch.randn(1, h, sum(lengths), 8) for h in (4, 2, 2)]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (t.to(dtype, copy=True).requires_grad_() for t in x)
        options = {"sliding_window": window, "cu_seq_lens_q": begins}
        out, _ = row_attention(torch.nn.Module(), q, k, v, None, **options)
        out.float().square().sum().backward()
        found.append([out.detach().float(), *(t.grad.float() for t in (q, k, v))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=0.05, atol=0.05)
    for begin, end in pairwise(begins.tolist()):
        one = (t[:, :, begin:end] for t in x)
        T = end - begin
        mask = torch.ones(T, T).tril().bool()
        mask &= ~torch.ones(T, T).tril(-(window or T)).bool()
        wanted = F.scaled_dot_product_attention(*one, mask, enable_gqa=True).transpose(1, 2)
        torch.testing.assert_close(found[0][0][:, begin:end], wanted, rtol=1e-4, atol=1e-5)


def test_rows_are_computed_together_where_they_are_short_and_padding_adds_little():
    groups = in_groups([(20, 20), (300, 300), (22, 22), (310, 310), (21, 40), (40, 40), (100, 120)])
    assert sorted(map(sorted, groups)) == [[0, 2, 4, 5], [1], [3], [6]]


@pytest.mark.parametrize("lengths", [[5, 9, 1], [7], [7, 8, 7, 3]])
def test_the_plain_form_in_bfloat16_is_sdpa_but_for_rounding(lengths: list[int]):
    torch.manual_seed(0)
    n = sum(lengths)
    q, k, v = (torch.randn(1, n, h, 8).transpose(1, 2).bfloat16() for h in (6, 2, 2))
    begins = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    found, _ = row_attention(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=begins)
    at = 0
    for T in lengths:
        one = [x[:, :, at : at + T].float() for x in (q, k, v)]
        wanted = F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
        got = found[:, at : at + T].transpose(1, 2).float()
        torch.testing.assert_close(got, wanted, rtol=0.03, atol=0.03)
        at += T


@pytest.mark.parametrize("window", [None, 3])
def test_rows_of_like_length_are_computed_together_and_stay_apart(window: int | None):
    torch.manual_seed(0)
    lengths = [8, 3, 7, 8, 6]
    begins = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    x = [torch.randn(1, h, sum(lengths), 8).bfloat16() for h in (6, 2, 2)]

    def outcome(at: slice, rows: torch.Tensor) -> list[torch.Tensor]:
        q, k, v = (t[:, :, at].clone().requires_grad_() for t in x)
        options = {"sliding_window": window, "cu_seq_lens_q": rows}
        out, _ = row_attention(torch.nn.Module(), q, k, v, None, **options)
        out.square().sum().backward()
        return [out.detach().transpose(1, 2), q.grad, k.grad, v.grad]

    whole = outcome(slice(None), begins)
    x[1][:, :, 8 + 3] = float("nan")  # in the third row
    harmed = outcome(slice(None), begins)
    for i, (begin, end) in enumerate(pairwise(begins.tolist())):
        if i != 2:
            alone = outcome(slice(begin, end), torch.tensor([0, end - begin]))
            for found, other, wanted in zip(whole, harmed, alone, strict=True):
                torch.testing.assert_close(found[:, :, begin:end], wanted, rtol=0.03, atol=0.03)
                assert torch.equal(other[:, :, begin:end], found[:, :, begin:end])
    assert harmed[0][:, :, 11:18].isnan().any()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
def test_all_rows_at_once_are_the_rows_one_by_one(window: int | None, softcap: float | None):
    torch.manual_seed(0)
    begins = torch.tensor([0, 5, 14, 15], dtype=torch.int32)
    q, k, v = (torch.randn(15, h, 8).double() for h in (6, 2, 2))
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    wanted, _ = row_attention(
        torch.nn.Module(),
        *heads_first,
        None,
        sliding_window=window,
        softcap=softcap,
        cu_seq_lens_q=begins,
    )
    found = all_rows(q, k, v, begins, 8**-0.5, window, softcap)
    torch.testing.assert_close(found, wanted[0], rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_kernels_of_a_gpu_are_the_rows_one_by_one(window: int | None, softcap: float | None):
    torch.manual_seed(0)
    begins = torch.tensor([0, 50, 140, 141], dtype=torch.int32)
    q, k, v = (torch.randn(141, h, 64).bfloat16() for h in (6, 2, 2))
    heads_first = (x.float().transpose(0, 1)[None] for x in (q, k, v))
    options = {"sliding_window": window, "softcap": softcap, "cu_seq_lens_q": begins}
    wanted, _ = row_attention(torch.nn.Module(), *heads_first, None, **options)
    on_gpu = (x.cuda() for x in (q, k, v, begins))
    found = all_rows(*on_gpu, 64**-0.5, window, softcap).float().cpu()
    torch.testing.assert_close(found, wanted[0], rtol=0.03, atol=0.03)


TREE = [
    row_behind(40, 41),
    row_behind(42, 43, 44, 45),
    row_behind(40, 46, 47),
]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2", "gpt-oss"])
def test_rows_behind_a_shared_prefix_have_the_loss_and_the_gradient_of_whole_rows(kind: str):
    model = build(kind)
    assert take_lines(model) is None
    assert take_prefixes(model)
    tree = LineCollator(share_prefixes=True)(TREE)
    assert tree["input_ids"].numel() < sum(map(len, TREE))
    whole = losses_and_gradients(model, [LineCollator()(TREE)])
    found = losses_and_gradients(model, [tree])
    # Norms round to float32, here what several rows have in common and there each of them.
    close = {"rtol": 1e-9, "atol": 1e-11} if kind == "gpt2" else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(found[0], whole[0], **close)
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, whole[1][name], **close)


def test_a_model_that_does_not_hear_of_prefixes_gets_none(monkeypatch: pytest.MonkeyPatch):
    model = build("llama")
    assert take_lines(model) is None
    forward = type(model).forward

    def deaf(self: Any, *args: Any, parents: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", deaf)
    assert not take_prefixes(model)
