"""Configurations that people bring along from other tools, as values of the RunSpec and options of a stack.

Nothing of them is run or opened: they are parsed strictly, and each key is looked up in the stack's option table.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lorapilot.errors import UserError
from runs.spec import OPTIONS, RunSpec, convert, to_number
from runs.stacks.base import Imported
from runs.stacks.option_table import OptionTable, StackOption, convert_option

Reader = Callable[[Any], dict[str, Any]]  # what a key's value says of the RunSpec; raises UserError
MOST_CHARACTERS = 200_000
MOST_DOTS = 100  # in a line: of a key with n dots tomllib keeps n² names, gigabytes for a long one
MOST_LEVELS = 32
BYTE_ORDER_MARK = "\ufeff"
MODEL_KEYS = ("pretrained_model_name_or_path", "model.name_or_path", "model.checkpoint_path", "model.diffusers_path",
              "model.transformer_path", "model.ckpt_path", "model.diffusion_model")  # fmt: skip


def read_toml(text: str) -> dict[str, Any]:
    """Raises UserError with line and column, which tomllib names."""
    check_length(text)
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > MOST_DOTS:
            raise UserError(f"Line {number} has more than {MOST_DOTS} dots: split it.", field="config")
    try:
        document = tomllib.loads(text.removeprefix(BYTE_ORDER_MARK))
    except tomllib.TOMLDecodeError as error:
        at_end = f"at line {text.count(chr(10)) + 1}, column {len(text) - text.rfind(chr(10))}"
        where = str(error).replace("at end of document", at_end)
        raise UserError(f"This is no TOML: {where}.", field="config") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists in lists
        raise UserError("This is no TOML that can be read.", field="config") from None
    check_levels(document)
    return document


def check_levels(value: Any) -> None:
    """Refuse what is nested so deeply that reading it further would exhaust the stack. Raises UserError."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise UserError(f"A configuration has at most {MOST_LEVELS} levels.", field="config")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()


def check_length(text: str) -> None:
    if not text.strip():
        raise UserError("The configuration is empty.", field="config")
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"A configuration has at most {MOST_CHARACTERS:,} characters.", field="config")


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dots in the names."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def without_sections(table: Mapping[str, Any]) -> dict[str, Any]:
    """As sd-scripts reads its TOML: names of sections mean nothing."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= dict(value) if isinstance(value, Mapping) else {key: value}
    return found


def as_spelled(table: OptionTable, keys: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`keys` with the choice under `name` as the table spells it, where a trainer reads it in any letters, or takes the
    path of a class (`torch.optim.AdamW`) as well."""
    given = str(keys.get(name, "")).rpartition(".")[2].lower()
    found = [choice for choice in table.options[name].choices if choice.lower() == given]
    return dict(keys) | ({name: found[0]} if found else {})


def taken_epochs(keys: dict[str, Any], name: str) -> int:
    """Epochs are taken out of `keys`; 0 when there are none. Raises UserError."""
    return int(to_number(keys.pop(name, None) or 0, label=name, field="steps", whole=True))


def reader(field: str) -> Reader:
    """Of a key that says the same as a field of the RunSpec."""
    return lambda value: {field: value}


def take_keys(table: OptionTable, keys: Mapping[str, Any], readers: Mapping[str, Reader]) -> Imported:
    """What the keys of a configuration mean here: `readers` give the RunSpec's values, the table the rest.

    A key that cannot be taken is left out, with a note that names it and says why. Wrong values are refused.
    """
    notes: list[str] = []
    options: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for key, value in keys.items():
        option = table.options.get(key)
        read = readers[key](value) if key in readers and value is not None else {}
        if option is None:
            notes.append(f"{key} is no option of {table.trainer}: left out.")
        elif option.instead_of and not _fits(option.instead_of, read.get(option.instead_of, value)):
            options |= _taken(option, value)
        elif key in readers:
            values |= {name: _finite(name, convert(name, given)) for name, given in read.items()}
            options |= _taken(option, value) if option.type == "names" else {}
        elif option.is_open:
            options |= _taken(option, value)
        else:
            notes += _left_out(option, value)
    return Imported(values, options, next((str(keys[key]) for key in MODEL_KEYS if keys.get(key)), ""), notes)


def _taken(option: StackOption, value: Any) -> dict[str, Any]:
    """A key of the trainer's own. Names in a list that a field says are taken out of it."""
    if option.type == "names":
        items = value if isinstance(value, list) else str(value).split()
        value = [item for item in items if str(item).partition("=")[0].strip() not in option.names_of_settings]
        if not value:
            return {}
    if value is False and option.type == "bool" and option.default in (None, False):
        return {}
    return {option.key: convert_option(option, value)}


def _left_out(option: StackOption, value: Any) -> list[str]:
    """Silence for what the platform does by itself."""
    if value in (None, "", False) or option.ours:
        return []
    if option.setting:
        return [f"{option.key} is left out: set {OPTIONS[option.setting].label} instead."]
    return [f"{option.key} is left out. {option.refused}"]


def _finite(field: str, value: Any) -> Any:
    """NaN and infinity are numbers to TOML and YAML, and none to JSON and to us."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{OPTIONS[field].label} is a number.", field=field)
    return value


def _fits(field: str, value: Any) -> bool:
    """Whether the RunSpec takes this value for the field alone."""
    try:
        RunSpec.from_values({field: value})
    except UserError:
        return False
    return True
