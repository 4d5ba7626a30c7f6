"""The loss in chunks is PyTorch's cross-entropy, and so is its gradient."""

import pytest
import torch
import torch.nn.functional as F

from lorakit.models import cross_entropy
from lorakit.models.cross_entropy import chunked_cross_entropy


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_cross_entropy_for_every_size_of_chunk(
    bias: bool, scale: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    h = torch.randn(7, 5).double().requires_grad_()
    W, b = torch.randn(11, 5).double(), torch.randn(11).double() if bias else None
    targets = torch.randint(0, 11, (7,))
    logits = F.linear(h, W, b) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    wanted = F.cross_entropy(logits, targets, reduction="none")
    weights = torch.randn(7).double()  # positions may count differently
    (gradient,) = torch.autograd.grad(wanted, h, weights)
    for rows, few in ((1, 1), (3, 2), (7, 2), (7, 9)):
        monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows * 11)
        monkeypatch.setattr(cross_entropy, "CACHED_ELEMENTS", few * 11)
        found = chunked_cross_entropy(h, W, b, targets, scale, softcap)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        (own,) = torch.autograd.grad(found, h, weights)
        torch.testing.assert_close(own, gradient, rtol=1e-10, atol=1e-12)
        assert torch.autograd.gradcheck(
            lambda x: chunked_cross_entropy(x, W, b, targets, scale, softcap), (h,)
        )


def test_without_gradients_and_without_positions_it_is_the_loss_alone():
    h, W = torch.randn(4, 3), torch.randn(6, 3)
    targets = torch.tensor([0, 5, 2, 2])
    found = chunked_cross_entropy(h, W, None, targets)
    torch.testing.assert_close(found, F.cross_entropy(h @ W.T, targets, reduction="none"))
    assert chunked_cross_entropy(h[:0], W, None, targets[:0]).shape == (0,)
