"""Does a step fit into the GPU's memory? Answered by doing one, since a measurement beats every formula."""

import torch

from lora_trainer.errors import is_out_of_memory
from lora_trainer.loop import Loop

USABLE_SHARE = 0.92
"""Of the GPU's memory; the rest is for fragments and for other programs' contexts."""


def fits_without_checkpointing(loop: Loop, device: torch.device) -> bool:
    """Rehearse the largest batch as it is. True on a CPU, where memory is rarely what a step lacks."""
    if device.type != "cuda":
        return True
    torch.cuda.reset_peak_memory_stats(device)
    try:
        loop.rehearse()
    except RuntimeError as error:
        # cuBLAS and cuDNN run out of memory in words of their own
        if not is_out_of_memory(error):
            raise
        loop.forget_gradients()
        torch.cuda.empty_cache()
        return False
    needed = torch.cuda.max_memory_allocated(device) + loop.optimizer_bytes
    torch.cuda.empty_cache()
    return needed < USABLE_SHARE * torch.cuda.get_device_properties(device).total_memory
