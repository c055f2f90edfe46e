"""Which attention kernel the denoiser uses: PyTorch's own, or xformers when it really works on this machine."""

from typing import Any

import torch

from lora_trainer.errors import ConfigError, explain


def choose_attention(unet: Any, wanted: str, device: torch.device) -> str:
    """Set it, and say in a sentence what is used and why. Raises ConfigError when xformers is wanted and fails.

    xformers can be importable without kernels for this GPU or this PyTorch, so it is tried on a small tensor, forward
    and backward. PyTorch's attention is as fast on recent GPUs, so `auto` stays with it.
    """
    if wanted != "xformers":
        return "Attention: PyTorch's scaled dot product."
    trouble = _try_xformers(device)
    if trouble:
        raise ConfigError(f"'attention' = 'xformers' does not work here ({trouble}). Use 'sdpa'.")
    unet.enable_xformers_memory_efficient_attention()
    return "Attention: xformers."


def _try_xformers(device: torch.device) -> str:
    """Empty when it works, else the reason in a few words."""
    try:
        from xformers.ops import memory_efficient_attention

        dtype = torch.float16 if device.type == "cuda" else torch.float32
        query = torch.randn(1, 16, 2, 64, device=device, dtype=dtype, requires_grad=True)
        memory_efficient_attention(query, query, query).sum().backward()
    except Exception as error:  # whatever a broken build raises
        if explain(error):  # out of memory, which says nothing of the build
            raise
        return str(error).strip().split("\n")[0] or type(error).__name__
    return ""
