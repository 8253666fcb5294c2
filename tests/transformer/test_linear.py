"""Linear maps by oneDNN are torch's own, forth and back."""

import pytest
import torch
import torch.nn.functional as F

from multihead.transformer import linear


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_and_its_gradients(bias, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    one = linear.Linear(128, 96, bias=bias)
    x = torch.randn(4, 129, 128).transpose(0, 1).requires_grad_()  # not as it lies in memory
    assert type(one(x).grad_fn).__name__ == "ProductBackward"
    wanted = torch.randn(129, 4, 96)
    inputs = (x, *one.parameters())
    found, expected = one(x), F.linear(x, one.weight, one.bias)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, wanted),
                               torch.autograd.grad(expected, inputs, wanted), rtol=1e-4, atol=1e-4)


def test_what_is_not_float32_in_training_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    one, x = linear.Linear(128, 64), torch.randn(1024, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert one(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(one(x), F.linear(x, one.weight, one.bias))
    assert type(one.double()(x.double()).grad_fn).__name__ == "AddmmBackward0"
