"""The option tables: every key that an external trainer knows, and what becomes of it here.

One TOML file for each stack in `options/`, facts read from the trainer's source at the version that the file names.
A key is either an option of its own, with a type and bounds, or it is closed: `setting` names the field of the RunSpec
that expresses it, `ours` says why the platform writes it itself, `refused` why it may not be set at all.

What `check_options` returns can be written into a trainer's config as it is: no value is a path, an address or code.
"""

from __future__ import annotations

import difflib
import functools
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from django.utils.text import get_text_list

from lorapilot.errors import Refusals, UserError
from models_registry.enums import describe_architecture
from runs import spec

FOLDER = Path(__file__).resolve().parent / "options"
GROUPS = (
    "Network",
    "Optimizer",
    "Schedule",
    "Data",
    "Noise",
    "Loss",
    "Sampling",
    "Saving",
    "Memory",
    "Model",
    "Logging",
)
NUMBERS = {"int", "float", "ints", "floats"}
PATTERNED = {"text", "words"}
TYPES = NUMBERS | PATTERNED | {"bool", "choice", "names"}
MOST_ITEMS = 64  # of a list
# Of one text. No path, no address, no second line, and nothing that a trainer would expand from its environment.
NEVER_IN_A_TEXT = re.compile(r"[/\\$`]|\.\.")
HELP_CHARACTERS = 110

# What a name in a list of "name=value" may be set to: how it is read, and how it is written for the trainer.
NAME_VALUES: dict[str, re.Pattern[str]] = {
    "int": re.compile(r"-?\d{1,9}"),
    "float": re.compile(r"-?(\d{1,9}(\.\d{0,12})?|\.\d{1,12})([eE][+-]?\d{1,2})?"),
    "bool": re.compile(r"true|false", re.IGNORECASE),
    "ints": re.compile(r"\d{1,6}(,\d{1,6}){0,63}"),
    "floats": re.compile(r"\d{1,6}(\.\d{0,12})?([eE]-?\d{1,2})?(,\d{1,6}(\.\d{0,12})?([eE]-?\d{1,2})?){0,63}"),
    "ranges": re.compile(r"all|none|\d{1,3}(-\d{1,3})?(,\d{1,3}(-\d{1,3})?){0,63}"),
}
NAME_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "ints": "whole numbers with commas between them",
    "floats": "numbers with commas between them",
    "ranges": "all, none, or numbers and ranges like 0-3,7",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StackOption:
    """One key of a trainer. `key` is the trainer's own, with dots where its config nests.

    `choices` are texts; `pattern` is what a text, or each of a list, is matched with as a whole; `most`, `least` and
    `above` bound a number, or each of a list. `names` are the names that a list of "name=value" may hold, with their
    types or choices; `names_of_settings` those that a field sets. `default` is the trainer's own.
    `instead_of`: the field of the RunSpec whose value this one replaces when it is set.
    """

    key: str
    group: str
    label: str = ""
    type: str = ""
    help: str = ""
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    default: Any = None
    example: Any = None
    count: int | None = None  # of a list, exactly
    pattern: str = ""
    names: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    names_of_settings: Mapping[str, str] = field(default_factory=dict)
    architectures: frozenset[str] = frozenset()  # empty: all
    instead_of: str = ""
    secret: str = ""  # name of the user's key of another service that the trainer needs when this is on
    setting: str = ""
    ours: str = ""
    refused: str = ""

    @property
    def field_name(self) -> str:
        """What a UserError about it names."""
        return f"options.{self.key}"

    @property
    def is_open(self) -> bool:
        return not (self.setting or self.ours or self.refused)

    def suits(self, architecture: str) -> bool:
        return not self.architectures or architecture in self.architectures


@dataclass(frozen=True, slots=True)
class OptionTable:
    trainer: str
    version: str
    options: Mapping[str, StackOption]


def options_within(options: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Those whose names begin with `section` (`"dataset."`), without it."""
    return {key.removeprefix(section): value for key, value in options.items() if key.startswith(section)}


def options_outside(options: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The others."""
    return {key: value for key, value in options.items() if not key.startswith(section)}


@functools.cache
def load_table(name: str) -> OptionTable:
    """The table of the stack `name`. Raises ValueError for one that says what it should not."""
    raw = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    if raw.keys() != {"trainer", "version", "read_from", "option"}:
        raise ValueError(f"{name}: a table has trainer, version, read_from and option, not {', '.join(raw)}")
    options: dict[str, StackOption] = {}
    for entry in raw["option"]:
        option = _option(entry)
        if option.key in options:
            raise ValueError(f"{name}: {option.key} is there twice")
        options[option.key] = option
    return OptionTable(raw["trainer"], raw["version"], options)


def check_options(table: OptionTable, values: Mapping[str, Any], *, architecture: str) -> dict[str, Any]:
    """The options of a run, typed, from JSON or a form: numbers and bools may be texts, lists texts of lines or commas.

    An empty text leaves its key to the trainer. Raises UserError about all that are wrong, each with the field
    `options.<key>`.
    """
    checked: dict[str, Any] = {}
    refusals = Refusals()
    for key, value in values.items():
        with refusals.caught():
            option = _usable(table, key, architecture)
            if not isinstance(value, str) or value.strip():
                checked[key] = CONVERTERS[option.type](option, value)
    refusals.raise_any()
    return checked


def _usable(table: OptionTable, key: str, architecture: str) -> StackOption:
    option = _known(table, key)
    if refusal := refusal_of(option):
        raise UserError(refusal, field=option.field_name)
    if not option.suits(architecture):
        suited = get_text_list([describe_architecture(one) for one in sorted(option.architectures)], "and")
        kind = describe_architecture(architecture)
        raise UserError(f"{key} is for {suited} only, and the model's kind is {kind}.", field=option.field_name)
    return option


def convert_option(option: StackOption, value: Any) -> Any:
    """One value as the option's type. Raises UserError."""
    return CONVERTERS[option.type](option, value)


def editable(table: OptionTable, architecture: str) -> list[StackOption]:
    """What a form offers for a model of `architecture`, in the table's order."""
    return [option for option in table.options.values() if option.is_open and option.suits(architecture)]


def groups(table: OptionTable, architecture: str) -> list[tuple[str, list[StackOption]]]:
    """As `editable`, by group; groups without an option are left out."""
    offered = editable(table, architecture)
    grouped = [(group, [option for option in offered if option.group == group]) for group in GROUPS]
    return [(group, options) for group, options in grouped if options]


def refusal_of(option: StackOption) -> str:
    """Why the key cannot be set as an option; empty when it can."""
    if option.setting:
        return f"{option.key} is set by the field {spec.OPTIONS[option.setting].label}."
    if option.ours:
        return f"{option.key} is set by the platform. {option.ours}"
    if option.refused:
        return f"{option.key} is refused. {option.refused}"
    return ""


def _known(table: OptionTable, key: str) -> StackOption:
    if key in table.options:
        return table.options[key]
    near = difflib.get_close_matches(key, table.options, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"{table.trainer} has no option {key!r}.{hint}", field=f"options.{key}")


def _bool(option: StackOption, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in {"true", "false"}:
        return value.strip().lower() == "true"
    raise UserError(f"{option.label} is true or false.", field=option.field_name)


def _int(option: StackOption, value: Any) -> int:
    return int(_number(option, value, whole=True))


def _float(option: StackOption, value: Any) -> float:
    return float(_number(option, value, whole=False))


def _number(option: StackOption, value: Any, *, whole: bool) -> float:
    number = spec.to_number(value, label=option.label, field=option.field_name, whole=whole)
    spec.check_bounds(number, option, label=option.label, field=option.field_name)
    return number


def _choice(option: StackOption, value: Any) -> str:
    if isinstance(value, str) and value in option.choices:
        return value
    raise UserError(f"{option.label}: {value!r} is none of {', '.join(option.choices)}.", field=option.field_name)


def _text(option: StackOption, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{option.label} is a text.", field=option.field_name)
    text = value.strip()
    if not text.isprintable() or NEVER_IN_A_TEXT.search(text):
        raise UserError(
            f"{option.label} is one line without slashes, backslashes, dollar signs, backquotes and double dots.",
            field=option.field_name,
        )
    if not re.fullmatch(option.pattern, text):
        raise UserError(f"{option.label} does not look like {option.example!r}.", field=option.field_name)
    return text


def _words(option: StackOption, value: Any) -> list[str]:
    one = _choice if option.choices else _text
    return [one(option, item) for item in _items(option, value)]


def _ints(option: StackOption, value: Any) -> list[int]:
    return [_int(option, item) for item in _items(option, value)]


def _floats(option: StackOption, value: Any) -> list[float]:
    return [_float(option, item) for item in _items(option, value)]


def _names(option: StackOption, value: Any) -> list[str]:
    """Each as "name=value", written as the trainer reads it; a name comes once."""
    written: dict[str, str] = {}
    for item in _items(option, value, separator="\n"):
        name, equals, text = str(item).partition("=")
        if not isinstance(item, str) or not equals:
            raise UserError(f"{option.label} is a list of name=value, one a line.", field=option.field_name)
        if name.strip() in written:
            raise UserError(f"{option.label}: {name.strip()} is there twice.", field=option.field_name)
        written[name.strip()] = _named_value(option, name.strip(), text.strip())
    return [f"{name}={text}" for name, text in written.items()]


def _named_value(option: StackOption, name: str, text: str) -> str:
    if name in option.names_of_settings:
        label = spec.OPTIONS[option.names_of_settings[name]].label
        raise UserError(f"{name} of {option.label} is set by the field {label}.", field=option.field_name)
    if name not in option.names:
        near = difflib.get_close_matches(name, option.names, n=1)
        hint = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(option.names)}."
        raise UserError(f"{option.label} has no name {name!r}.{hint}", field=option.field_name)
    wanted = option.names[name]
    if isinstance(wanted, tuple):
        if text not in wanted:
            raise UserError(f"{name}: {text!r} is none of {', '.join(wanted)}.", field=option.field_name)
        return text
    packed = re.sub(r"\s*,\s*", ",", text)
    if not NAME_VALUES[wanted].fullmatch(packed):
        raise UserError(f"{name} is {NAME_KINDS[wanted]}.", field=option.field_name)
    return packed.capitalize() if wanted == "bool" else packed


def _items(option: StackOption, value: Any, separator: str = ",") -> list[Any]:
    if isinstance(value, str):
        value = [item.strip() for line in value.splitlines() for item in line.split(separator) if item.strip()]
    if not isinstance(value, list | tuple):
        raise UserError(f"{option.label} is a list.", field=option.field_name)
    if option.count is not None and len(value) != option.count:
        raise UserError(f"{option.label} is a list of {option.count}.", field=option.field_name)
    if not 0 < len(value) <= MOST_ITEMS:
        raise UserError(f"{option.label} has 1 to {MOST_ITEMS} items.", field=option.field_name)
    return list(value)


CONVERTERS: dict[str, Callable[[StackOption, Any], Any]] = {
    "bool": _bool,
    "int": _int,
    "float": _float,
    "text": _text,
    "words": _words,
    "choice": _choice,
    "ints": _ints,
    "floats": _floats,
    "names": _names,
}
ATTRIBUTES = {attribute.name for attribute in fields(StackOption)}


def _option(entry: Mapping[str, Any]) -> StackOption:
    """Strict: a slip in a table is found when it is loaded, not when somebody's run fails."""
    key = entry.get("key", "?")
    if unknown := entry.keys() - ATTRIBUTES:
        raise ValueError(f"{key}: unknown attributes {', '.join(sorted(unknown))}")
    values = dict(entry)
    for name in ("choices", "architectures"):
        values[name] = tuple(values.get(name, ()))
    values["architectures"] = frozenset(values["architectures"])
    values["names"] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.get("names", {}).items()}
    option = StackOption(**values)
    for problem in _problems(option):
        raise ValueError(f"{key}: {problem}")
    return option


def _problems(option: StackOption) -> Sequence[str]:
    named = [option.setting, option.instead_of, *option.names_of_settings.values()]
    wrong = {
        "its group is none": option.group not in GROUPS,
        "one of setting, ours and refused": sum(map(bool, (option.setting, option.ours, option.refused))) > 1,
        "it names a field that the RunSpec does not have": any(name and name not in spec.OPTIONS for name in named),
    }
    if option.is_open:
        wrong |= _wrong_if_open(option)
    return [problem for problem, is_so in wrong.items() if is_so] or _example_problem(option)


def _wrong_if_open(option: StackOption) -> dict[str, bool]:
    bounded = option.most is not None and (option.least is not None or option.above is not None)
    kinds = [kind for kind in option.names.values() if isinstance(kind, str)]
    return {
        "an option has a label and a help": not (option.label and option.help),
        "its help is too long": len(option.help) > HELP_CHARACTERS,
        "its type is none": option.type not in TYPES,
        "a number has bounds, and nothing else": (option.type in NUMBERS) != bounded,
        "a choice has choices": option.type == "choice" and not option.choices,
        "only choices and words have choices": option.type not in {"choice", "words"} and bool(option.choices),
        "a text has a pattern or choices, and an example": option.type in PATTERNED
        and not (option.example and bool(option.pattern) != bool(option.choices)),
        "a list of names has names, and nothing else": (option.type == "names") != bool(option.names),
        "a name's type is none": not set(kinds) <= NAME_VALUES.keys(),
    }


def _example_problem(option: StackOption) -> Sequence[str]:
    """Default and example must be values that the option takes."""
    if not option.is_open:
        return []
    for value in (option.default, option.example):
        try:
            if value is not None:
                CONVERTERS[option.type](option, value)
        except UserError as error:
            return [error.message]
    return []
