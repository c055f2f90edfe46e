"""Captions for CLIP text encoders: to token ids and to hidden states, long ones in chunks as sd-scripts does it.

A chunk is 77 ids: start, 75 of the caption, end. Two or three chunks are encoded each by itself and joined without the
starts and ends between them, which makes 152 or 227 states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

CHUNK = 77
INSIDE = CHUNK - 2
MERGES = Path(__file__).parent.parent / "assets" / "clip-tokenizer" / "merges.txt"
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(pad: str) -> Any:
    """CLIP's own tokenizer, for models that come without one. Padding is END, or "!" for OpenCLIP."""
    merges = [tuple(line.split(" ")) for line in MERGES.read_text(encoding="utf-8").splitlines()]
    single = _byte_characters()
    words = [*single, *(f"{one}</w>" for one in single), *map("".join, merges), START, END]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer: Any = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CHUNK)  # type: ignore[arg-type]
    tokenizer.pad_token = pad
    return tokenizer


def _byte_characters() -> list[str]:
    """A visible character for each byte, in the order of CLIP's vocabulary: first those that are visible already."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, visible), *(chr(256 + index) for index in range(256 - len(visible)))]


def caption_ids(tokenizer: Any, caption: str) -> list[int]:
    """Ids without start and end, uncut."""
    # without the option, a "!" in a caption would be taken for the padding of OpenCLIP's tokenizer
    ids: list[int] = tokenizer(caption, add_special_tokens=False, split_special_tokens=True).input_ids
    return ids


def tokenize(tokenizer: Any, captions: list[str], max_token_length: int) -> Tensor:
    """[batch, chunks, 77]; what does not fit into 75, 150 or 225 tokens is cut off."""
    return torch.stack([_chunks(tokenizer, caption, max_token_length) for caption in captions])


def _chunks(tokenizer: Any, caption: str, length: int) -> Tensor:
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    row = [*caption_ids(tokenizer, caption)[:length], end]
    row += [pad] * (length + 1 - len(row))
    # every chunk ends with the row's last id: the end or padding
    chunks = torch.tensor([[start, *row[at : at + INSIDE], row[-1]] for at in range(0, length, INSIDE)])
    if length > INSIDE and pad != end:
        for chunk in chunks:
            if chunk[-2] not in (end, pad):
                chunk[-1] = end
            if chunk[1] == pad:
                chunk[1] = end
    return chunks


def text_model(encoder: Any) -> Any:
    """The transformer itself: transformers 5 wraps it only where a projection follows."""
    return getattr(encoder, "text_model", encoder)


def run(encoder: Any, tokens: Tensor) -> Any:
    """The encoder's output with all its hidden states [batch * chunks, 77, features], for ids [batch, chunks, 77]."""
    device = text_model(encoder).embeddings.token_embedding.weight.device
    return encoder(tokens.flatten(0, 1).to(device), output_hidden_states=True)


def join(states: Tensor, tokens: Tensor) -> Tensor:
    """The states of all chunks as one sequence: [batch, 75 * chunks + 2, features]."""
    states = states.view(*tokens.shape, -1)
    inner = states[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)


def pool(encoder: Any, output: Any, tokens: Tensor, end: int) -> Tensor:
    """[batch, projection]: the projected last state at the first chunk's first end token."""
    states: Tensor = output.last_hidden_state.view(*tokens.shape, -1)[:, 0]
    place = (tokens[:, 0] == end).int().argmax(dim=1).to(states.device)
    states = states[torch.arange(len(states), device=states.device), place]
    projected: Tensor = encoder.text_projection(states)
    return projected


def kohya_name(prefix: str, path: str) -> str:
    """A module's name in Kohya's file, whatever transformers calls the module around it."""
    return f"{prefix}_text_model_{path.removeprefix('text_model.').replace('.', '_')}"


def layers(encoder: nn.Module) -> int:
    """How many the encoder has."""
    config: Any = encoder.config
    return int(config.num_hidden_layers)
