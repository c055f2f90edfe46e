"""A linear layer with its LoRA as one operation: W x + bias + scale · up(down(x)).

Written out, autograd keeps a dozen nodes for it (products, views, a scaling, a sum), and a UNet has hundreds of such
layers. On a CPU their bookkeeping costs a tenth of the step; on a GPU each is a kernel to start. The answer is that of
peft's own layer, bit for bit, so diffusers draws from the saved file exactly what the trainer drew. Gradients are the
same but for the rounding of sums.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor
from torch.nn import functional

ADAPTER = "default"


class FusedLinear(Linear):
    """peft's layer for the one thing that happens here: a single adapter, always on, never merged, no dropout."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        base: Any = self.base_layer
        down: Any = self.lora_A[ADAPTER]
        up: Any = self.lora_B[ADAPTER]
        apply: Any = _LinearWithLora.apply
        answer: Tensor = apply(x, base.weight, base.bias, down.weight, up.weight, self.scaling[ADAPTER])
        return answer


class _LinearWithLora(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or None, down [rank, in], up [out, rank] → [..., out]

    `weight` and `bias` are frozen. Everything is computed in autocast's number format where it is on, else in the
    weight's; gradients come back in the format of what they belong to.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        x, weight, down, up = (one.to(dtype) for one in (x, weight, down, up))
        inner = functional.linear(x, down)  # [..., rank]
        update = functional.linear(inner, up)
        if scale != 1:
            update *= scale
        ctx.save_for_backward(x, inner, weight, down, up)
        ctx.scale = scale
        return functional.linear(x, weight, bias if bias is None else bias.to(dtype)).add_(update)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, down, up = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])  # [n, out]
        if ctx.scale != 1:  # on what is small; before the products, so that float16 overflows no sooner
            inner, up = inner * ctx.scale, up * ctx.scale
        of_inner = rows @ up  # [n, rank]
        of_up = rows.T @ inner.reshape(-1, inner.shape[-1])
        of_down = of_inner.T @ x.reshape(-1, x.shape[-1])
        of_x = (rows @ weight).addmm_(of_inner, down).view(x.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_down, of_up, None
