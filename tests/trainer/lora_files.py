"""LoRA files for tests, written by hand: no PyTorch, and any damage that a test wants."""

import json
import struct
from math import prod

from lora_trainer.layouts import UNET, full_size

BYTES = {"F16": 2, "BF16": 2, "F32": 4}


def number(value, dtype="F16"):
    """One number as a tensor: (dtype, shape, bytes)."""
    if dtype == "BF16":
        return dtype, (), struct.pack("<f", value)[2:]
    return dtype, (), struct.pack({"F16": "<e", "F32": "<f"}[dtype], value)


def zeros(*shape, dtype="F16"):
    return dtype, shape, bytes(prod(shape) * BYTES[dtype])


def write(path, tensors, metadata=None):
    """A .safetensors file of {key: (dtype, shape, bytes)}."""
    header, end = {}, 0
    for key, (dtype, shape, content) in tensors.items():
        header[key] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [end, end + len(content)],
        }
        end += len(content)
    if metadata:
        header["__metadata__"] = metadata
    raw = json.dumps(header).encode()
    data = b"".join(content for _, _, content in tensors.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def kohya_module(name, shape, rank=1, alpha=1.0):
    """down, up and alpha for a weight of this shape."""
    ones = (1,) * (len(shape) - 2)
    return {
        f"{name}.lora_down.weight": zeros(rank, *shape[1:]),
        f"{name}.lora_up.weight": zeros(shape[0], rank, *ones),
        f"{name}.alpha": number(alpha),
    }


def is_convolution(path):
    return any(f".{kind}." in path for kind in ("resnets", "downsamplers", "upsamplers"))


def targets(layout, *, convolutions=False):
    """(part, path, shape) of what sd-scripts gives a LoRA: inside the transformers, and maybe the convolutions."""
    for part, modules in layout.parts.items():
        for path, shape in modules.items():
            wanted = ".attentions." in path or ".layers." in path or (convolutions and is_convolution(path))
            if wanted:
                yield part, path, shape


def file_name(layout, part, path):
    if part != UNET:
        prefix = f"lora_{part}_" if layout.key == "sdxl" else "lora_te_"
        return prefix + path.replace(".", "_")
    name = layout.original_name(path) if layout.key == "sdxl" else path
    return "lora_unet_" + name.replace(".", "_")


def kohya_tensors(layout_or_key, *, convolutions=False, rank=1, alpha=1.0):
    """A whole LoRA in Kohya's format, for all three parts."""
    layout = full_size(layout_or_key) if isinstance(layout_or_key, str) else layout_or_key
    tensors = {}
    for part, path, shape in targets(layout, convolutions=convolutions):
        tensors |= kohya_module(file_name(layout, part, path), shape, rank, alpha)
    return tensors


def diffusers_tensors(key):
    prefixes = {"unet": "unet.", "te1": "text_encoder.", "te2": "text_encoder_2."}
    tensors = {}
    for part, path, shape in targets(full_size(key)):
        name = prefixes[part] + path
        ones = (1,) * (len(shape) - 2)
        tensors[f"{name}.lora_A.weight"] = zeros(2, *shape[1:])
        tensors[f"{name}.lora_B.weight"] = zeros(shape[0], 2, *ones)
    return tensors
