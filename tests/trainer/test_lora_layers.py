"""The fused layer against peft's own: the same answer, the same gradients."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_trainer.lora_layers import FusedLinear

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def network(kind, dtype, alpha):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 24, bias=False))
    layers = layers.to(dtype).requires_grad_(requires_grad=False)
    plan = LoraConfig(r=4, lora_alpha=alpha, target_modules="0|2")
    if kind is FusedLinear:
        plan._register_custom_module({nn.Linear: FusedLinear})
    inject_adapter_in_model(plan, layers)
    for name, parameter in layers.named_parameters():
        if "lora_" in name:  # trained in float32, and not at zero any more
            parameter.data = parameter.data.float() + 0.1 * torch.randn(parameter.shape)
    assert {type(layers[place]) for place in (0, 2)} == {kind}
    return layers


def outcome(kind, dtype, alpha, shape, *, checkpointed=False):
    layers = network(kind, dtype, alpha)
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        answer = checkpoint(layers, x, use_reentrant=False) if checkpointed else layers(x)
    answer.float().square().sum().backward()
    trained = [parameter.grad for parameter in layers.parameters() if parameter.requires_grad]
    return answer.detach(), [x.grad, *trained]


@pytest.mark.parametrize("shape", [(6, 24), (2, 5, 24)])
@pytest.mark.parametrize("alpha", [4, 1, 3])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_the_fused_layer_answers_bit_for_bit_like_pefts(dtype, alpha, shape):
    expected, expected_gradients = outcome(Linear, dtype, alpha, shape)
    answer, gradients = outcome(FusedLinear, dtype, alpha, shape)
    assert torch.equal(answer, expected)
    assert len(gradients) == 5
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= ROUNDING[dtype] * other.norm()


def test_checkpointing_changes_nothing():
    plain = outcome(FusedLinear, torch.float32, 3, (2, 5, 24))
    again = outcome(FusedLinear, torch.float32, 3, (2, 5, 24), checkpointed=True)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(*pair) for pair in zip(plain[1], again[1], strict=True))
