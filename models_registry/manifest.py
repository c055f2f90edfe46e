"""The list of models that can be pulled: a text file, one model a line, documented in docs/models.md.

    name|kind|source|subdir|include|size|licence|gated|architecture|stacks|role

Columns behind `subdir` may be left out. A line that cannot be used is reported with its number; the others still work.
Names and places come from this file alone, never from a server: each is checked here before anything uses it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal, cast
from urllib.parse import SplitResult, unquote, urlsplit

from django.conf import settings

from lorapilot import workspace
from lorapilot.errors import Missing
from models_registry.enums import ATTACHABLE, describe_architecture, describe_role
from models_registry.recognition import is_pickle

Kind = Literal["hf_file", "hf_repo", "url"]
KINDS = ("hf_file", "hf_repo", "url")
STACKS = {
    "builtin": "built-in",
    "kohya": "Kohya",
    "ai_toolkit": "AI Toolkit",
    "diffusion_pipe": "diffusion-pipe",
    "captioner": "captions",
}
# What a base model can be registered from; the other roles are parts that trainers need beside it.
REGISTRABLE = ("checkpoint", "transformer", "unet", "pipeline")
ROLES = (*REGISTRABLE, *ATTACHABLE, "text_encoder", "tokenizer", "other")
COLUMNS = ("name", "kind", "source", "subdir", "include", "size", "licence", "gated", "architecture", "stacks", "role")
MOST_BYTES = 16 * 1024**2  # of a manifest

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([KMGT]i?B)?", re.IGNORECASE)
UNITS = {"kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4}
UNITS |= {"kib": 1024, "mib": 1024**2, "gib": 1024**3, "tib": 1024**4}
ARCHITECTURE = re.compile(r"[a-z0-9_]{0,30}")
SHA256 = re.compile(r"sha256=([0-9a-f]{64})")
PICKLE_REASON = "a pickle file can run any program when it is opened; take the .safetensors version"


class WrongLine(ValueError):
    """A line of the manifest that cannot be used; the message is a sentence without its full stop."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: a file or a folder of files, where it comes from and where it goes."""

    name: str
    kind: Kind
    source: str
    subdir: str
    include: tuple[str, ...] = ()
    expected_size_bytes: int | None = None  # about; what the server says counts
    licence: str = ""
    is_gated: bool = False
    architecture: str = ""
    stacks: tuple[str, ...] = ()
    role: str = ""

    @property
    def category(self) -> str:
        """The kind of thing: its folder in the models folder, else its role."""
        return self.subdir.split("/", maxsplit=1)[0] or self.role

    @property
    def repository(self) -> str:
        """`owner/name` on the hub; empty for a `url`."""
        return "" if self.kind == "url" else self.source.partition(":")[0]

    @property
    def repository_path(self) -> str:
        """The one file's path in its repository; empty for the other kinds."""
        return self.source.partition(":")[2] if self.kind == "hf_file" else ""

    @property
    def file_name(self) -> str:
        """The one file's name here; empty for a repository, whose files keep their paths."""
        if self.kind == "hf_repo":
            return ""
        if self.kind == "url" and self.include:
            return self.include[0]
        return PurePosixPath(self.repository_path or unquote(urlsplit(self.source).path)).name

    @property
    def sha256(self) -> str:
        """Of a `url`, when the manifest says it; the hub tells that of its files itself."""
        found = SHA256.fullmatch(urlsplit(self.source).fragment) if self.kind == "url" else None
        return found[1] if found else ""

    @property
    def is_registrable(self) -> bool:
        return self.role in REGISTRABLE

    @property
    def family(self) -> str:
        """The architecture as people call it."""
        return describe_architecture(self.architecture)

    @property
    def stack_titles(self) -> list[str]:
        return [STACKS[stack] for stack in self.stacks]

    @property
    def role_title(self) -> str:
        if self.role == "pipeline":
            return "Diffusers folder"
        return describe_role(self.role) if self.role else ""

    @property
    def licence_address(self) -> str:
        """Where a gated repository's licence is accepted, and where everything is read about it."""
        return f"https://huggingface.co/{self.repository}" if self.repository else ""

    def target(self, subdir: str = "") -> str:
        """Where the file, or the folder of files, lies in the models folder."""
        return "/".join(part for part in (subdir or self.subdir, self.file_name) if part)

    def provides(self, path: str) -> bool:
        """Is the file at `path` of the repository among those that this entry brings?"""
        return not self.include or any(fnmatchcase(path, pattern) for pattern in self.include)


@dataclass(frozen=True, slots=True)
class Problem:
    line: int
    message: str

    def __str__(self) -> str:
        return f"Line {self.line}: {self.message}."


@dataclass(frozen=True, slots=True)
class Manifest:
    entries: tuple[Entry, ...]
    problems: tuple[Problem, ...]


def load() -> Manifest:
    """The installation's manifest (setting MODELS_MANIFEST). One that cannot be read is empty, with a problem."""
    path: Path = settings.MODELS_MANIFEST
    try:
        status = path.stat()
    except OSError:
        return Manifest((), (Problem(0, f"{path} cannot be read: set MODELS_MANIFEST to a file"),))
    return _read(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, _changed_at: int, size: int) -> Manifest:
    if size > MOST_BYTES:
        return Manifest((), (Problem(0, f"{path} is too large for a manifest"),))
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return Manifest((), (Problem(0, f"{path} is no readable text in UTF-8"),))


def find(name: str) -> Entry:
    """The entry of that name. Raises Missing."""
    found = next((entry for entry in load().entries if entry.name == name), None)
    if found is None:
        raise Missing(f"The manifest has no model called {name[:100]}.")
    return found


def entry_for_file(path: str, *, repository: str = "") -> Entry | None:
    """The entry that would provide a file that somebody misses, told by what the file is: its repository (`owner/name`)
    and its path there or, without a repository, its own name. Folders here say nothing. None when no entry provides
    it, or when several different ones would: a name like `model.safetensors` is nobody's."""
    entries = load().entries
    if repository:
        found = [entry for entry in entries if entry.repository == repository and _brings(entry, path)]
        return found[0] if found else None
    found = [entry for entry in entries if entry.file_name == PurePosixPath(path).name]
    return found[0] if len(found) == 1 else None


def _brings(entry: Entry, path: str) -> bool:
    if entry.kind == "hf_file":
        return path in (entry.repository_path, entry.file_name)
    return entry.provides(path) and not is_pickle(path)


# --- Reading ----------------------------------------------------------------------------------------------------------
def parse(text: str) -> Manifest:
    """Every line that can be used, and what is wrong with the others."""
    entries: list[Entry] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            entry = parse_line(line)
            _refuse_doubles(entry, entries)
        except WrongLine as error:
            problems.append(Problem(number, str(error)))
        else:
            entries.append(entry)
    return Manifest(tuple(entries), tuple(problems))


def parse_line(line: str) -> Entry:
    """Raises WrongLine."""
    cells = [cell.strip() for cell in line.split("|")]
    if not 4 <= len(cells) <= len(COLUMNS):
        raise WrongLine(f"{len(cells)} columns instead of 4 to {len(COLUMNS)}: {'|'.join(COLUMNS)}")
    row = dict.fromkeys(COLUMNS, "") | dict(zip(COLUMNS, cells, strict=False))
    entry = Entry(
        name=_name(row["name"]),
        kind=cast("Kind", _one_of("kind", row["kind"], KINDS)),
        source=row["source"],
        subdir=checked_folder(row["subdir"]),
        include=_words(row["include"]),
        expected_size_bytes=_size(row["size"]),
        licence=_printable(row["licence"]),
        is_gated=_one_of("gated", row["gated"] or "no", ("yes", "no")) == "yes",
        architecture=_architecture(row["architecture"]),
        stacks=tuple(_one_of("stacks", stack, tuple(STACKS)) for stack in _words(row["stacks"])),
        role=_one_of("role", row["role"], ("", *ROLES)),
    )
    CHECKS[entry.kind](entry)
    return entry


def checked_folder(subdir: str) -> str:
    """A folder inside the models folder, of safe names. Raises WrongLine."""
    if subdir and not is_safe_path(subdir):
        raise WrongLine(f"the folder {subdir!r} is not made of letters, digits, dots, dashes and single slashes")
    return subdir


def is_safe_path(path: str) -> bool:
    """True for a relative path that is made of safe names only and stays below where it starts."""
    return len(path) <= 400 and all(workspace.is_safe_name(part) for part in path.split("/"))


def _check_hf_file(entry: Entry) -> None:
    repository, separator, path = entry.source.partition(":")
    if not separator or not REPOSITORY.fullmatch(repository) or not is_safe_path(path):
        raise WrongLine("the source of an hf_file is owner/repository:path/of/the.file")
    if entry.include:
        raise WrongLine("an hf_file is one file: leave include empty")
    _refuse_pickle(path)


def _check_hf_repo(entry: Entry) -> None:
    if not REPOSITORY.fullmatch(entry.source):
        raise WrongLine("the source of an hf_repo is owner/repository")
    if not entry.subdir:
        raise WrongLine("an hf_repo needs a folder (subdir) for its files")
    for pattern in entry.include:
        _refuse_pickle(pattern)


def _check_url(entry: Entry) -> None:
    parts = _split(entry.source)
    if parts.scheme not in ("https", "http") or not parts.hostname or parts.username is not None:
        raise WrongLine("the source of a url is an address that starts with https://")
    if parts.fragment and not SHA256.fullmatch(parts.fragment):
        raise WrongLine("behind # stands sha256= and 64 lower-case hexadecimal digits")
    if len(entry.include) > 1 or not workspace.is_safe_name(entry.file_name) or "." not in entry.file_name:
        raise WrongLine("the address ends in no plain file name: write the one that the file gets into include")
    _refuse_pickle(entry.file_name)


CHECKS: dict[str, Callable[[Entry], None]] = {"hf_file": _check_hf_file, "hf_repo": _check_hf_repo, "url": _check_url}


def _split(address: str) -> SplitResult:
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError:
        raise WrongLine(f"{address[:100]!r} is no address") from None
    if not address.isascii() or not address.isprintable() or " " in address:
        raise WrongLine("an address has no spaces or special characters: write them as %20 and the like")
    return parts


def _refuse_pickle(path: str) -> None:
    if is_pickle(path):
        raise WrongLine(f"{PurePosixPath(path).name}: {PICKLE_REASON}")


def _refuse_doubles(entry: Entry, entries: Iterable[Entry]) -> None:
    for other in entries:
        if other.name.lower() == entry.name.lower():
            raise WrongLine(f"there is a model called {entry.name} above")
        if entry.file_name and other.target().lower() == entry.target().lower():
            raise WrongLine(f"{entry.target()} is where {other.name} goes")


def _name(name: str) -> str:
    if not workspace.is_safe_name(name):
        raise WrongLine(f"the name {name[:100]!r} is not made of letters, digits, dots and dashes")
    return name


def _one_of(column: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise WrongLine(f"{column} is {value[:50]!r} and not one of {', '.join(filter(None, allowed))}")
    return value


def _words(cell: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in cell.split(",") if word.strip())


def _printable(cell: str) -> str:
    if len(cell) > 100 or not cell.isprintable():
        raise WrongLine("a licence has at most 100 printable characters")
    return cell


def _architecture(cell: str) -> str:
    if not ARCHITECTURE.fullmatch(cell):
        raise WrongLine(f"the architecture {cell[:50]!r} is not made of small letters, digits and underscores")
    return cell


def _size(cell: str) -> int | None:
    """`6938078334`, `6.9GB` or `6.5 GiB`; empty: unknown."""
    if not cell:
        return None
    found = SIZE.fullmatch(cell)
    if not found or (not found[2] and "." in found[1]):
        raise WrongLine(f"the size {cell[:50]!r} is neither a number of bytes nor one like 6.9GB")
    return round(float(found[1]) * UNITS[found[2].lower()]) if found[2] else int(found[1])
