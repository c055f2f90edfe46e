"""Which names in a LoRA file ComfyUI, A1111 and diffusers read, and which weights they put them on. Torch-free.

Each program turns a name into a module in its own way; what is written here are the results, as tables made from the
base model's layout. A key that no table has is one that the program skips, or refuses the file for.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lora_trainer.layouts import TEXT_1, TEXT_2, UNET, Layout, Modules, Shape
from lora_trainer.lora_contents import DIFFUSERS, KOHYA, FileModule


@dataclass(frozen=True)
class Program:
    """A program that loads LoRA files."""

    key: str
    title: str
    targets: Callable[[Layout], Modules]
    """Names that it reads -> shape of the weight that each changes."""
    is_strict: bool
    """Tensors must have the target's own dimensions; otherwise the product must have as many numbers."""

    def reads_spelling(self, module: FileModule) -> bool:
        """Whether it knows these endings on such a name."""
        if not self.is_strict:
            return True
        return module.spelling == (DIFFUSERS if "." in module.name else KOHYA)

    def reads_key(self, key: str) -> bool:
        """Whether it takes this key of a module that it reads."""
        # diffusers knows alpha in this spelling only from the metadata
        return not (self.is_strict and key.endswith(".alpha") and not key.startswith("lora_"))

    def at_other_strength(self, modules: Iterable[FileModule]) -> list[FileModule]:
        """Those that it scales by another alpha than the file's.

        diffusers 0.42, reading Kohya's spelling, takes the commonest alpha of each part for all attention modules, and
        for all modules of the first text encoder: it loses track of their own when it renames them.
        """
        if not self.is_strict:
            return []
        kohyas = [module for module in modules if module.spelling == KOHYA and module.alpha is not None]
        commonest: dict[str, float | None] = {}
        for part in {module.part for module in kohyas}:
            alphas = Counter(module.alpha for module in kohyas if module.part == part)
            commonest[part] = alphas.most_common(1)[0][0]
        return [one for one in kohyas if one.alpha != commonest[one.part] and _loses_alpha(one)]


def _loses_alpha(module: FileModule) -> bool:
    if module.part == UNET:
        return module.name.endswith(("_to_q", "_to_k", "_to_v", "_to_out_0"))
    return module.part == TEXT_1 or "_self_attn_" in module.name


def fits(module: FileModule, target: Shape, *, strictly: bool) -> bool:
    """Whether up · down has the shape of the weight that it is added to."""
    if module.down is None or module.up is None:
        return False
    rank, outside, inside = module.rank, target[0], target[1:]
    if strictly:
        ones = (1,) * (len(target) - 2)
        return module.down == (rank, *inside) and module.up == (outside, rank, *ones)
    return (module.up[0], _numbers(module.up)) == (outside, rank) and _numbers(module.down) == _numbers(target)


def _numbers(shape: Shape) -> int:
    """Per row of the weight."""
    total = 1
    for size in shape[1:]:
        total *= size
    return total


def _flat(path: str) -> str:
    return path.replace(".", "_")


def comfyui(layout: Layout) -> Modules:
    """Original and diffusers names for the UNet, both with and without dots; text encoders in both spellings."""
    return dict(_comfyui(layout))


def _comfyui(layout: Layout) -> Iterator[tuple[str, Shape]]:
    for path, shape in layout.parts[UNET].items():
        original = layout.original_name(path)
        yield f"lora_unet_{_flat(path)}", shape
        yield f"lora_unet_{_flat(original)}", shape
        yield f"lycoris_{_flat(path)}", shape
        yield f"diffusion_model.{original}", shape
        # the spelling of diffusers' older files; the newer `attn1.to_q` is not among them
        old = path.replace(".to_", ".processor.to_").removesuffix(".0") if ".to_" in path else path
        yield old, shape
        yield f"unet.{old}", shape
    for path, shape in layout.parts[TEXT_1].items():
        yield f"lora_te_{_flat(path)}", shape
        yield f"lora_te1_{_flat(path)}", shape
        yield f"text_encoder.{path}", shape
    for path, shape in layout.parts.get(TEXT_2, {}).items():
        yield f"lora_te2_{_flat(path)}", shape
        if path != "text_projection":
            yield f"text_encoder_2.{path}", shape


def a1111(layout: Layout) -> Modules:
    """Original and diffusers names for the UNet, Kohya's for the text encoders; nothing with dots."""
    return dict(_a1111(layout))


def _a1111(layout: Layout) -> Iterator[tuple[str, Shape]]:
    for path, shape in layout.parts[UNET].items():
        original = layout.original_name(path)
        yield f"lora_unet_{_flat(original)}", shape
        if not path.startswith("add_embedding") and _a1111_knows_upsampler(path, original):
            yield f"lora_unet_{_flat(path)}", shape
    prefixes = {"sdxl": ("lora_te1_",), "sd2": ("lora_te_",)}.get(layout.key, ("lora_te_", "lora_te1_"))
    for path, shape in layout.parts[TEXT_1].items():
        for prefix in prefixes:
            yield f"{prefix}{_flat(path)}", shape
    for path, shape in layout.parts.get(TEXT_2, {}).items():
        if path != "text_projection":
            yield f"lora_te2_{_flat(path)}", shape


def _a1111_knows_upsampler(path: str, original: str) -> bool:
    """It takes every resolution but the first for one with attention, which holds for SD 1.5 and 2 only."""
    if ".upsamplers." not in path:
        return True
    resolution, place = int(path.split(".")[1]), original.split(".")[2]
    return place == ("2" if resolution else "1")


def diffusers(layout: Layout) -> Modules:
    """Kohya's names (original ones of blocks for SDXL only) or its own, dotted."""
    return dict(_diffusers(layout))


def _diffusers(layout: Layout) -> Iterator[tuple[str, Shape]]:
    for path, shape in layout.parts[UNET].items():
        yield f"unet.{path}", shape
        if not path.startswith("add_embedding"):  # its conversion drops the number
            yield f"lora_unet_{_flat(path)}", shape
        if layout.key == "sdxl" or "block" not in path:
            yield f"lora_unet_{_flat(layout.original_name(path))}", shape
    for path, shape in layout.parts[TEXT_1].items():
        yield f"text_encoder.{path}", shape
        yield f"text_encoder.{path.removeprefix('text_model.')}", shape
        yield f"lora_te_{_flat(path)}", shape
        yield f"lora_te1_{_flat(path)}", shape
    for path, shape in layout.parts.get(TEXT_2, {}).items():
        if path != "text_projection":
            yield f"text_encoder_2.{path}", shape
            yield f"lora_te2_{_flat(path)}", shape


PROGRAMS = (
    Program("comfyui", "ComfyUI", comfyui, is_strict=False),
    Program("a1111", "A1111", a1111, is_strict=False),
    Program("diffusers", "diffusers", diffusers, is_strict=True),
)
