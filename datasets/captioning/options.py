"""How pictures are captioned: the settings of an order, one table, checked once. No database here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets.captioning.enums import LOCAL, REMOTE, Captioner
from datasets.captions import is_text
from lorapilot.errors import UserError

MOST_PROMPT_CHARACTERS = 4000
MOST_EXCLUDED = 1000
TRIGGER = "{trigger}"
DEFAULT_PROMPT = (
    "Describe this picture in one or two plain sentences, as a caption for training an image model. Name the subject, "
    "what it does, the setting, the light and the style. Answer with the description only."
)
PROMPT_WITH_TRIGGER = f"{DEFAULT_PROMPT} Call the main subject “{TRIGGER}”."


@dataclass(frozen=True, slots=True)
class Number:
    label: str
    default: float | None
    least: float
    most: float
    captioners: frozenset[Captioner]
    help: str = ""
    is_whole: bool = True


TAGGER, SENTENCES = frozenset({Captioner.TAGGER}), frozenset({Captioner.SENTENCES})
NUMBERS: dict[str, Number] = {
    "max_tokens": Number("Most tokens of a caption", 300, 8, 8192, REMOTE | SENTENCES),
    "pixels": Number(
        "Longest side of what is sent", 1024, 128, 4096, REMOTE, "Pixels. Larger pictures are made smaller, as JPEG."
    ),
    "requests_per_minute": Number("Requests a minute, at most", 60, 1, 6000, REMOTE),
    "input_price": Number(
        "Price of a million input tokens", None, 0, 1e6, REMOTE, "By your provider's price list.", is_whole=False
    ),
    "output_price": Number("Price of a million output tokens", None, 0, 1e6, REMOTE, is_whole=False),
    "general_threshold": Number(
        "Threshold of general tags", 0.35, 0, 1, TAGGER, "A tag needs at least this probability.", is_whole=False
    ),
    "character_threshold": Number("Threshold of character tags", 0.85, 0, 1, TAGGER, is_whole=False),
}
FLAGS: dict[str, frozenset[Captioner]] = {
    "begin_with_trigger": REMOTE | LOCAL,
    "underscores_to_spaces": TAGGER,
}
TEXTS: dict[str, frozenset[Captioner]] = {"prompt": REMOTE | SENTENCES, "exclude": TAGGER}


def checked_options(captioner: Captioner, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an order: those that are given and the defaults of the others. Raises UserError, with the field.

    What belongs to another captioner is refused unless it is empty, as fields of a form are.
    """
    known = {name for name in (*NUMBERS, *FLAGS, *TEXTS) if captioner in _captioners_of(name)}
    for name, value in given.items():
        if name not in known and value not in (None, "", False):
            raise UserError(f"{captioner.label} has no option {name!r}.", field=name)
    numbers = {name: _number(name, given.get(name)) for name in NUMBERS if name in known}
    flags = {name: _flag(name, given.get(name)) for name in FLAGS if name in known}
    texts = {name: READERS[name](given.get(name)) for name in TEXTS if name in known}
    return numbers | flags | texts


def _captioners_of(name: str) -> frozenset[Captioner]:
    return NUMBERS[name].captioners if name in NUMBERS else FLAGS.get(name) or TEXTS[name]


def _number(name: str, value: Any) -> float | None:
    described = NUMBERS[name]
    if value in (None, ""):
        return described.default
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not described.least <= number <= described.most or (described.is_whole and not number.is_integer()):
        kind = "a whole number" if described.is_whole else "a number"
        bounds = f"{described.least:g} to {described.most:,.0f}"
        raise UserError(f"{described.label}: enter {kind} from {bounds}.", field=name)
    return int(number) if described.is_whole else number


def _flag(name: str, value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, bool):
        raise UserError(f"{name} is true or false.", field=name)
    return value


def _prompt(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError("The prompt is a text.", field="prompt")
    prompt = (value or "").strip()
    if len(prompt) > MOST_PROMPT_CHARACTERS or not is_text(prompt):
        raise UserError(f"A prompt has at most {MOST_PROMPT_CHARACTERS:,} characters of text.", field="prompt")
    return prompt


def _excluded(value: Any) -> list[str]:
    """Tags that are never proposed: a list, or a text with commas or line breaks between them."""
    parts = value.replace("\n", ",").split(",") if isinstance(value, str) else value or []
    if not isinstance(parts, list) or not all(isinstance(part, str) and is_text(part) for part in parts):
        raise UserError("Name the tags, with commas between them.", field="exclude")
    if len(parts) > MOST_EXCLUDED:
        raise UserError(f"At most {MOST_EXCLUDED:,} tags can be left out.", field="exclude")
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


READERS: dict[str, Any] = {"prompt": _prompt, "exclude": _excluded}


def filled_prompt(template: str, trigger_word: str) -> str:
    """What the model is asked; an empty template means ours, which names the trigger word if there is one."""
    chosen = template or (PROMPT_WITH_TRIGGER if trigger_word else DEFAULT_PROMPT)
    return chosen.replace(TRIGGER, trigger_word)


def with_trigger(caption: str, trigger_word: str) -> str:
    """`caption`, beginning with the trigger word unless that is in it already."""
    if not trigger_word or trigger_word.casefold() in caption.casefold():
        return caption
    return f"{trigger_word}, {caption}"


def cost_of(options: Mapping[str, Any], input_tokens: int, output_tokens: int) -> float | None:
    """Tokens times the prices that the user entered; None without a price."""
    prices = options.get("input_price"), options.get("output_price")
    if prices == (None, None):
        return None
    return (input_tokens * (prices[0] or 0) + output_tokens * (prices[1] or 0)) / 1e6
