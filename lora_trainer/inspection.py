"""`inspect FILE` and `verify FILE`: what a LoRA file holds, and whether other programs use all of it. Torch-free.

`verify` ends with 0 when every program asked for uses every key as it is meant, with 1 when not, and with 2 when there
is no answer: a damaged file, no LoRA, an unknown architecture. `inspect` ends with 0 or 2.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_trainer.errors import FINISHED, ModelError
from lora_trainer.layouts import TEXT_1, TEXT_2, UNET, Layout, full_size, read_layout
from lora_trainer.lora_contents import FileModule, LoraFile, read_lora_file
from lora_trainer.lora_readers import PROGRAMS, Program, fits
from lora_trainer.safetensors_header import HeaderError

NOT_ALL_USED, NO_ANSWER = 1, 2
LINES_SHOWN = 10
TITLES = {"sd15": "SD 1.5", "sd2": "SD 2", "sdxl": "SDXL", "": "unknown"}
PART_TITLES = {UNET: "UNet", TEXT_1: "text encoder 1", TEXT_2: "text encoder 2", "": "something else"}
_BY_CROSS_ATTENTION = {768: "sd15", 1024: "sd2", 2048: "sdxl"}
_BY_BASE_VERSION = {"sd_v1": "sd15", "sd_1": "sd15", "sd_v2": "sd2", "sd_2": "sd2", "sdxl": "sdxl"}
# metadata: (name of the fact, key); the first key that the file has counts
_FACTS = (
    ("title", ("modelspec.title", "ss_output_name")),
    ("author", ("modelspec.author",)),
    ("description", ("modelspec.description",)),
    ("trigger_phrase", ("modelspec.trigger_phrase",)),
    ("date", ("modelspec.date",)),
    ("base_model", ("ss_sd_model_name",)),
    ("base_model_version", ("ss_base_model_version", "modelspec.architecture")),
    ("prediction_type", ("modelspec.prediction_type",)),
    ("steps", ("ss_steps",)),
    ("epochs", ("ss_epoch",)),
    ("images", ("ss_num_train_images",)),
    ("regularisation_images", ("ss_num_reg_images",)),
    ("resolution", ("ss_resolution", "modelspec.resolution")),
    ("batch_size", ("ss_total_batch_size", "ss_batch_size_per_device")),
    ("optimizer", ("ss_optimizer",)),
    ("learning_rate", ("ss_learning_rate",)),
    ("unet_learning_rate", ("ss_unet_lr",)),
    ("text_encoder_learning_rate", ("ss_text_encoder_lr",)),
    ("lr_scheduler", ("ss_lr_scheduler",)),
    ("seed", ("ss_seed",)),
    ("comment", ("ss_training_comment",)),
)


class NoAnswerError(Exception):
    """The file is no LoRA that can be judged. `str(error)` is a sentence that says why."""


@dataclass(frozen=True)
class Part:
    """The modules of one part of the base model. Ranks and alphas: value -> how many modules have it."""

    part: str
    modules: int
    convolutions: int
    ranks: dict[str, int]
    alphas: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """What a LoRA file holds."""

    file: str
    bytes: int
    spelling: str
    """kohya, diffusers or mixed"""
    architecture: str
    """sd15, sd2, sdxl; empty when it cannot be told"""
    dtype: str
    parameters: int
    parts: list[Part]
    has_convolutions: bool
    other_keys: list[str]
    facts: dict[str, str]
    datasets: dict[str, dict[str, int]]
    """Folder -> n_repeats and img_count, as the metadata says."""
    hash_matches: bool | None
    """Whether the weights are those that were hashed when the file was written; None: no hash in it."""


@dataclass(frozen=True)
class Misfit:
    """A module whose tensors do not fit the weight that its name stands for."""

    module: str
    weight: list[int]
    down: list[int]
    up: list[int]


@dataclass(frozen=True)
class Verdict:
    """What one program does with the file."""

    program: str
    modules: int
    used: int
    unused_keys: list[str]
    misfits: list[Misfit]
    at_other_strength: list[str]
    """Modules that it uses, but scales by another alpha than the file's."""

    @property
    def is_complete(self) -> bool:
        """Whether every key is used, as it is meant."""
        return not (self.unused_keys or self.misfits or self.at_other_strength)


@dataclass(frozen=True)
class Verification:
    """What the programs do with the file, for a base model of this architecture."""

    file: str
    architecture: str
    base: str
    """The base model's folder or file; empty: the published one."""
    is_complete: bool
    programs: list[Verdict]


def run(arguments: list[str]) -> int:
    """The command line, from `inspect` or `verify` on; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "inspect":
            return _show(asdict(found := inspect(options.file)), _inspection_lines(found), as_json=options.json)
        verification = verify(options.file, base=options.base, programs=options.programs)
    except (HeaderError, NoAnswerError, ModelError) as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"{error.filename or options.file} cannot be read: {error.strerror}.")
    _show(asdict(verification), _verification_lines(verification), as_json=options.json)
    return FINISHED if verification.is_complete else NOT_ALL_USED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_trainer")
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting = commands.add_parser("inspect", help="say what a LoRA file holds")
    verifying = commands.add_parser("verify", help="say whether other programs use all of a LoRA file")
    for one in (inspecting, verifying):
        one.add_argument("file", type=Path, help="a .safetensors file")
        one.add_argument("--json", action="store_true", help="one JSON object instead of text")
    verifying.add_argument(
        "--base",
        type=Path,
        help="the base model, a diffusers folder or one file; without it, the published SD 1.5, SD 2 or SDXL",
    )
    verifying.add_argument(
        "--for",
        dest="programs",
        type=_program_keys,
        default=[program.key for program in PROGRAMS],
        metavar="NAMES",
        help="some of comfyui,a1111,diffusers; without it, all",
    )
    return parser


def _program_keys(text: str) -> list[str]:
    keys = text.split(",")
    if unknown := set(keys) - {program.key for program in PROGRAMS}:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is not among comfyui, a1111, diffusers")
    return keys


def _show(as_table: dict[str, Any], lines: Iterator[str], *, as_json: bool) -> int:
    text = json.dumps(as_table, indent=2, ensure_ascii=False) if as_json else "\n".join(lines)
    sys.stdout.write(f"{text}\n")
    return FINISHED


def _refuse(sentence: str) -> int:
    sys.stderr.write(f"Error: {sentence}\n")
    return NO_ANSWER


def inspect(path: Path) -> Inspection:
    """What the file holds; HeaderError or NoAnswerError (sentences) when it holds no LoRA, OSError when unreadable."""
    file = _read(path)
    dtypes = Counter(tensor.dtype for key, tensor in file.header.tensors.items() if not key.endswith(".alpha"))
    return Inspection(
        file=path.name,
        bytes=file.header.file_bytes,
        spelling=file.spelling,
        architecture=architecture_of(file),
        dtype=", ".join(dtype for dtype, _ in dtypes.most_common()),
        parameters=sum(tensor.elements for key, tensor in file.header.tensors.items() if not key.endswith(".alpha")),
        parts=_parts(file),
        has_convolutions=any(module.is_convolution for module in file.modules.values()),
        other_keys=file.strangers,
        facts=_facts(file.header.metadata),
        datasets=_datasets(file.header.metadata),
        hash_matches=_hash_matches(file),
    )


def _read(path: Path) -> LoraFile:
    file = read_lora_file(path)
    if not any(module.spelling for module in file.modules.values()):
        raise NoAnswerError(f"{path.name} holds no LoRA: none of its {len(file.header.tensors)} keys is one of a LoRA.")
    return file


def _parts(file: LoraFile) -> list[Part]:
    groups: dict[str, list[FileModule]] = {}
    for module in file.modules.values():
        groups.setdefault(module.part, []).append(module)
    return [_part(part, groups[part]) for part in PART_TITLES if part in groups]


def _part(part: str, modules: list[FileModule]) -> Part:
    ranks = Counter(str(module.rank) for module in modules)
    alphas = Counter("none" if module.alpha is None else f"{module.alpha:g}" for module in modules)
    convolutions = sum(module.is_convolution for module in modules)
    return Part(part, len(modules), convolutions, dict(ranks.most_common()), dict(alphas.most_common()))


def architecture_of(file: LoraFile) -> str:
    """From the shapes where they tell it, else from the names, else from the metadata."""
    for module in file.modules.values():
        if module.name.endswith(("attn2_to_k", "attn2.to_k", "attn2.processor.to_k")):
            if key := _BY_CROSS_ATTENTION.get(module.inside):
                return key
            break
    return _by_text_encoders(file) or _by_metadata(file.header.metadata)


def _by_text_encoders(file: LoraFile) -> str:
    parts = {module.part for module in file.modules.values()}
    if TEXT_2 in parts or any(name.startswith("lora_te1_") for name in file.modules):
        return "sdxl"
    widths = {module.inside for module in file.modules.values() if module.part == TEXT_1 and "fc1" in module.name}
    return {768: "sd15", 1024: "sd2"}.get(next(iter(widths), 0), "")


def _by_metadata(metadata: Mapping[str, str]) -> str:
    version = metadata.get("ss_base_model_version", "")
    return next((key for start, key in _BY_BASE_VERSION.items() if version.startswith(start)), "")


def _facts(metadata: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name, keys in _FACTS:
        value = next((metadata[key] for key in keys if metadata.get(key, "None") not in ("None", "")), None)
        if value is not None:
            found[name] = value
    return found


def _datasets(metadata: Mapping[str, str]) -> dict[str, dict[str, int]]:
    try:
        found = json.loads(metadata.get("ss_dataset_dirs", "{}"))
    except ValueError:
        return {}
    is_table = isinstance(found, dict) and all(isinstance(one, dict) for one in found.values())
    return found if is_table else {}


def _hash_matches(file: LoraFile) -> bool | None:
    metadata = file.header.metadata
    written = metadata.get("modelspec.hash_sha256", "").removeprefix("0x") or metadata.get("sshs_model_hash", "")
    return file.weights_hash() == written if written else None


def verify(path: Path, *, base: Path | None = None, programs: list[str] | None = None) -> Verification:
    """How much of the file each program uses. Errors as those of `inspect`, and ModelError for `base`."""
    file = _read(path)
    layout = read_layout(base) if base else _published(file)
    wanted = [program for program in PROGRAMS if programs is None or program.key in programs]
    verdicts = [_verdict(program, file, layout) for program in wanted]
    is_complete = all(verdict.is_complete for verdict in verdicts)
    return Verification(path.name, layout.key, str(base) if base else "", is_complete, verdicts)


def _published(file: LoraFile) -> Layout:
    key = architecture_of(file)
    if not key:
        raise NoAnswerError(
            f"{file.path.name} is a LoRA for a base model that is not SD 1.5, SD 2 or SDXL. Name the model with --base."
        )
    return full_size(key)


def _verdict(program: Program, file: LoraFile, layout: Layout) -> Verdict:
    targets = program.targets(layout)
    unused, misfits = list(file.strangers), []
    used: list[FileModule] = []
    for module in file.modules.values():
        target = targets.get(module.name)
        if target is None or not module.down or not module.up or not program.reads_spelling(module):
            unused += module.keys
        elif not fits(module, target, strictly=program.is_strict):
            misfits.append(Misfit(module.name, list(target), list(module.down), list(module.up)))
        else:
            used.append(module)
            unused += [key for key in module.keys if not program.reads_key(key)]
    otherwise = [module.name for module in program.at_other_strength(used)]
    return Verdict(program.title, len(file.modules), len(used), unused, misfits, otherwise)


def _inspection_lines(found: Inspection) -> Iterator[str]:
    yield f"{found.file}: LoRA for {TITLES[found.architecture]}, {found.bytes / 1e6:.1f} MB"
    yield f"  keys         {found.spelling}, {found.dtype}, {found.parameters:,} parameters"
    for part in found.parts:
        convolutions = f", {part.convolutions} of them convolutions" if part.convolutions else ""
        yield f"  {PART_TITLES[part.part]:<12} {part.modules} modules{convolutions}"
        yield f"    rank       {_counts(part.ranks)}"
        yield f"    alpha      {_counts(part.alphas)}"
    if found.other_keys:
        yield f"  other keys   {len(found.other_keys)}"
        yield from _some(found.other_keys, 4)
    for name, value in found.facts.items():
        yield f"  {name.replace('_', ' ')}: {value}"
    for folder, counts in found.datasets.items():
        yield f"  dataset {folder}: {counts.get('img_count')} pictures, {counts.get('n_repeats')} times"
    if found.hash_matches is not None:
        yield f"  weights {'match' if found.hash_matches else 'DO NOT match'} the hash in the file"


def _counts(values: dict[str, int]) -> str:
    """`16`, or `16 (722 modules), 8 (66 modules)`."""
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({count} modules)" for value, count in values.items())


def _verification_lines(found: Verification) -> Iterator[str]:
    base = f" ({found.base})" if found.base else ""
    yield f"{found.file}, on {TITLES[found.architecture]}{base}:"
    for verdict in found.programs:
        yield f"  {verdict.program:<9} uses {verdict.used} of {verdict.modules} modules"
        if verdict.unused_keys:
            yield f"    {len(verdict.unused_keys)} keys are not used:"
            yield from _some(verdict.unused_keys, 6)
        if verdict.misfits:
            yield f"    {len(verdict.misfits)} modules do not fit:"
            yield from _some([_misfit_line(misfit) for misfit in verdict.misfits], 6)
        if verdict.at_other_strength:
            yield f"    {len(verdict.at_other_strength)} modules are scaled by another alpha than the file's:"
            yield from _some(verdict.at_other_strength, 6)
    if any(verdict.misfits for verdict in found.programs) and not found.base:
        yield "  If it was trained on a model of another size, name that model with --base."


def _misfit_line(misfit: Misfit) -> str:
    return f"{misfit.module}: down {misfit.down} and up {misfit.up} on a weight {misfit.weight}"


def _some(lines: list[str], indent: int) -> Iterator[str]:
    yield from (f"{' ' * indent}{line}" for line in lines[:LINES_SHOWN])
    if len(lines) > LINES_SHOWN:
        yield f"{' ' * indent}and {len(lines) - LINES_SHOWN} more; --json lists all"
