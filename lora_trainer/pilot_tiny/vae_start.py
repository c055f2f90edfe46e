"""A start for the autoencoder from which it can learn: it shrinks a picture to 16 × 16 and enlarges it again.

From PyTorch's own random start so small an autoencoder stays at grey, as its group norms erase flat colours. Here eight
channels carry the colour through all layers: red, green and blue as pairs of opposite sign, since silu(x) - silu(-x) is
x, and two large constants, which keep the group norms from rescaling the colours. The rest starts small, and every
residual branch at zero.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

CARRIED = 8
CONSTANT = 6.0
DAMPING = 0.3
"""Factor on the random weights of whatever does not carry the colour."""
LOG_VARIANCE = -6.0
"""Of the latents at the start: almost no noise."""
CENTRE = [(1, 1)]
QUARTER = [(0, 0), (0, 1), (1, 0), (1, 1)]


@torch.no_grad()
def start_near_identity(vae: Any, pictures: Tensor) -> None:
    """Set the weights in place; the two scales are fitted to pictures [count, 3, height, width] from -1 to 1."""
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif name.endswith("conv_shortcut"):
            _carry(module, [(0, 0)])
        elif name.endswith("conv") and "downsamplers" in name:
            _carry(module, QUARTER)
        elif name.endswith("conv") and "upsamplers" in name:
            _carry(module, CENTRE)
    for module in (vae.encoder.conv_in, vae.decoder.conv_in):
        _split_signs(module)
    for module in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(module.weight)
        nn.init.zeros_(module.bias)
    for module in (vae.encoder.conv_out, vae.decoder.conv_out):
        _join_signs(module)
    _start_latents(vae.encoder.conv_out)
    _fit_scales(vae, pictures)


def _damp(convolution: Any) -> None:
    convolution.weight.mul_(DAMPING)
    convolution.bias.mul_(DAMPING)
    convolution.weight[:CARRIED] = 0
    convolution.bias[:CARRIED] = 0


def _carry(convolution: Any, taps: list[tuple[int, int]]) -> None:
    """The carried channels pass through, averaged over the taps (row, column) of the kernel."""
    _damp(convolution)
    for channel in range(CARRIED):
        for row, column in taps:
            convolution.weight[channel, channel, row, column] = 1 / len(taps)


def _split_signs(convolution: Any) -> None:
    """Three channels to three pairs of opposite sign, and the constants."""
    _damp(convolution)
    for channel in range(3):
        convolution.weight[channel, channel, 1, 1] = 1
        convolution.weight[channel + 3, channel, 1, 1] = -1
    convolution.bias[6], convolution.bias[7] = CONSTANT, -CONSTANT


def _join_signs(convolution: Any) -> None:
    """Three pairs back to three channels."""
    nn.init.zeros_(convolution.bias)
    convolution.weight[:3] = 0
    for channel in range(3):
        convolution.weight[channel, channel, 1, 1] = 1
        convolution.weight[channel, channel + 3, 1, 1] = -1


def _start_latents(convolution: Any) -> None:
    """The fourth latent starts small; the last four outputs are the log-variances."""
    convolution.weight[3] *= DAMPING
    convolution.weight[4:] = 0
    convolution.bias[4:] = LOG_VARIANCE


def _fit_scales(vae: Any, pictures: Tensor) -> None:
    """Least squares: the latents to the mean colours of 8 × 8 pixels, then the decoded pictures to the pictures."""
    colours = avg_pool2d(pictures, 8)
    latents = vae.encode(pictures).latent_dist.mode()[:, :3]
    vae.encoder.conv_out.weight[:3] *= (latents * colours).sum() / latents.square().sum()
    decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
    vae.decoder.conv_out.weight *= (decoded * pictures).sum() / decoded.square().sum()
