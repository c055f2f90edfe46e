"""CLIP's tokenizer as the folders that external trainers look for, made from the merges that ours ships.

sd-scripts wants one folder for each Hub id, named by it with "/" as "_", and downloads what it does not find.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from django.conf import settings

MERGES = settings.BASE_DIR / "lora_trainer" / "assets" / "clip-tokenizer" / "merges.txt"
START, END = "<|startoftext|>", "<|endoftext|>"
# Folder → the token that fills up short prompts. OpenCLIP's models were trained with token 0, "!".
PADDING = {
    "openai_clip-vit-large-patch14": END,
    "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k": "!",
    "stabilityai_stable-diffusion-2": "!",
}


def tokenizer_files(root: Path) -> dict[Path, str]:
    """The tokenizer folders below `root` that are missing: path → text. About 1 MB each."""
    missing = {
        folder: pad for folder, pad in PADDING.items() if not (root / folder / "tokenizer_config.json").is_file()
    }
    return {root / folder / name: text for folder, pad in missing.items() for name, text in _files(pad).items()}


def _files(padding: str) -> Mapping[str, str]:
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": padding}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace"}
    config |= {"add_prefix_space": False, "clean_up_tokenization_spaces": True}
    vocabulary, merges = _vocabulary()
    return {
        "vocab.json": vocabulary,
        "merges.txt": merges,
        "special_tokens_map.json": json.dumps(special, indent=1),
        "tokenizer_config.json": json.dumps(config | special, indent=1),  # the last one: it makes the folder complete
    }


@functools.cache
def _vocabulary() -> tuple[str, str]:
    """vocab.json and merges.txt. Token numbers: 256 bytes, the same at a word's end, one for each merge, two marks."""
    merges = [line for line in MERGES.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, START, END])}
    # The reader skips the first line, which is a version in the published file.
    return json.dumps(vocabulary, ensure_ascii=False), "\n".join(["#version: 0.2", *merges, ""])


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte, in its order: bytes that print stand for themselves, the others come behind."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printing), *(chr(256 + number) for number in range(256 - len(printing)))]
