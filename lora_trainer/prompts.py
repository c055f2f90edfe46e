"""Sample prompts: tables in the configuration, or Kohya's text file with a prompt a line. Torch-free."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from lora_trainer.buckets import Size
from lora_trainer.errors import ConfigError


@dataclass(frozen=True)
class SamplePrompt:
    """One picture to draw while training."""

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    steps: int
    scale: float
    """Classifier-free guidance scale."""


TYPES = get_type_hints(SamplePrompt)
TYPE_NAMES = {str: "a text", int: "a whole number", float: "a number"}
FLAGS: dict[str, tuple[str, type]] = {
    "n": ("negative_prompt", str),
    "d": ("seed", int),
    "w": ("width", int),
    "h": ("height", int),
    "s": ("steps", int),
    "l": ("scale", float),
}


def read_prompts(value: Any, *, size: Size, seed: int) -> tuple[SamplePrompt, ...]:
    """The option's value as prompts; what a prompt leaves open is taken from `size` (pixels) and `seed`."""
    rows = _prompt_file(Path(value)) if isinstance(value, str) and value else value or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError("'sample_prompts' must be a list of tables with at least a 'prompt', or a text file's path.")
    defaults = {"negative_prompt": "", "seed": seed, "width": size[0], "height": size[1], "steps": 20, "scale": 5.0}
    return tuple(_sample_prompt({**defaults, **row}) for row in rows)


def _sample_prompt(values: dict[str, Any]) -> SamplePrompt:
    for key in values:
        if key not in TYPES:
            near = get_close_matches(key, TYPES, n=1, cutoff=0.5)
            hint = f" Did you mean '{near[0]}'?" if near else f" Known are {', '.join(TYPES)}."
            raise ConfigError(f"'sample_prompts': unknown key '{key}'.{hint}")
    values["scale"] = float(values["scale"]) if type(values["scale"]) is int else values["scale"]
    for key, wanted in TYPES.items():
        if type(values.get(key)) is not wanted:
            raise ConfigError(f"'sample_prompts': '{key}' must be {TYPE_NAMES[wanted]}, not {values.get(key)!r}.")
    prompt = SamplePrompt(**values)
    if not _is_side(prompt.width) or not _is_side(prompt.height) or prompt.steps < 1:
        raise ConfigError("'sample_prompts': width and height are multiples of 8, and steps is at least 1.")
    return prompt


def _is_side(pixels: int) -> bool:
    return pixels >= 8 and pixels % 8 == 0


def _prompt_file(path: Path) -> list[Mapping[str, Any]]:
    """Kohya's prompt file: a prompt a line, `--flag value` after it, `#` for comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'sample_prompts': {path} cannot be read: {error}.") from error
    return [_prompt_line(line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _prompt_line(line: str) -> Mapping[str, Any]:
    prompt, *flags = line.split(" --")
    row: dict[str, Any] = {"prompt": prompt.strip()}
    for flag in flags:
        letter, _, text = flag.partition(" ")
        if letter not in FLAGS:
            known = shlex.join("--" + known for known in FLAGS)
            raise ConfigError(f"'sample_prompts': unknown flag --{letter}; known are {known}.")
        key, wanted = FLAGS[letter]
        try:
            row[key] = wanted(text.strip())
        except ValueError as error:
            raise ConfigError(f"'sample_prompts': --{letter} needs {TYPE_NAMES[wanted]}, not {text!r}.") from error
    return row
