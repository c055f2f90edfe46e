"""The trainers on this machine: where they are, which version, what is missing and the command that mends it.

Two questions, two answers. A stack asks `installation_error(key)` before each launch: it looks for files only, and
costs nothing. Hosts and `manage.py doctor` ask `look_at(key)`: it starts the trainer's own Python, which says what that
one can import and whether its PyTorch sees a GPU. That takes seconds, so no page asks it; a host keeps the answer in
its row. Nothing here runs git or imports a trainer.

Packages are those of each trainer's requirements.txt at the version that LoRA Pilot was tested with.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from django.conf import settings

from runs.stacks.base import PASSED_ON

PROBE_SECONDS = 30
KEPT_SECONDS = 600.0
VENVS = ("venv", ".venv")

# Imports nothing but torch: the others are looked for. What a library prints comes before our line.
PROBE = """
import importlib.util, json, platform, sys
load_torch, *names = sys.argv[1:]
found = {"python": platform.python_version(), "missing": [n for n in names if importlib.util.find_spec(n) is None]}
if "torch" not in found["missing"]:
    try:
        if load_torch == "1":
            import torch
            found["torch"] = torch.__version__
            found["cuda"] = torch.version.cuda or ""
            found["gpus"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
        else:
            import importlib.metadata
            found["torch"] = importlib.metadata.version("torch")
    except Exception as error:
        found["torch_error"] = f"{type(error).__name__}: {error}"
print()
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and the shell command that mends it. `what` names no folder: everybody may read it."""

    what: str
    mend: str = ""
    is_warning: bool = False  # it can be used all the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """What is to be known of a trainer before it is looked at."""

    name: str
    script: str  # in its folder, by which it is recognised
    needs: tuple[str, ...]  # packages, as they are imported, without which it does not start
    wants: tuple[str, ...] = ()  # without these some choices fail, such as an optimizer
    torch: str = "torch torchvision"  # what pip has to install beside the requirements
    repository: str = ""
    tested_version: str = ""
    tested_commit: str = ""
    version_file: str = ""
    needs_gpu: bool = False

    @property
    def tested(self) -> str:
        return f"{self.tested_version} ({self.tested_commit})" if self.tested_version else self.tested_commit


COMMON = ("torch", "accelerate", "diffusers", "transformers", "safetensors", "numpy", "PIL", "tqdm", "toml")
TRAINERS: dict[str, Trainer] = {
    "builtin": Trainer(
        name="Built-in trainer",
        script="lora_trainer/__main__.py",
        needs=(*COMMON, "peft", "tensorboard"),
        wants=("lion_pytorch", "prodigyopt", "schedulefree"),
        torch="",
    ),
    "kohya": Trainer(
        name="Kohya sd-scripts",
        script="train_network.py",
        needs=(
            *COMMON, "torchvision", "cv2", "einops", "ftfy", "huggingface_hub", "imagesize", "rich", "sentencepiece",
            "tensorboard", "voluptuous",
        ),
        wants=("bitsandbytes", "lion_pytorch", "prodigyopt", "prodigyplus", "pytorch_optimizer", "schedulefree"),
        repository="https://github.com/kohya-ss/sd-scripts",
        tested_version="v0.10.1",
        tested_commit="48d368fa",
    ),
    "ai_toolkit": Trainer(
        name="AI Toolkit",
        script="run.py",
        needs=(
            *COMMON, "torchvision", "torchaudio", "torchao", "albumentations", "cv2", "dotenv", "einops",
            "flatten_json", "huggingface_hub", "kornia", "lpips", "lycoris", "omegaconf", "optimum", "oyaml", "peft",
            "pydantic", "scipy", "sentencepiece", "slugify", "tensorboard", "timm", "yaml",
        ),
        wants=("bitsandbytes", "prodigyopt"),
        torch="torch torchvision torchaudio",
        repository="https://github.com/ostris/ai-toolkit",
        tested_version="0.12.26",
        tested_commit="27a03a91",
        version_file="version.py",
    ),
    "diffusion_pipe": Trainer(
        name="diffusion-pipe",
        script="train.py",
        needs=(
            *COMMON, "torchvision", "torchaudio", "datasets", "deepspeed", "einops", "ftfy", "imageio", "loguru",
            "multiprocess", "omegaconf", "peft", "sentencepiece", "tensorboard", "wandb",
        ),
        wants=("bitsandbytes", "optimi", "pytorch_optimizer"),
        torch="torch torchvision torchaudio",
        repository="https://github.com/tdrussell/diffusion-pipe",
        tested_commit="8f83dbf2",
        needs_gpu=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """What was found of one trainer on one machine. All values are JSON, so that a host can keep them."""

    home: str = ""  # empty: not installed
    python: str = ""
    version: str = ""
    commit: str = ""
    python_version: str = ""
    torch: str = ""
    cuda: str = ""  # that PyTorch was built for; empty: a build without CUDA, or not looked at
    gpus: int = 0  # that PyTorch sees
    error: str = ""  # what its Python said, when it did not answer as it should
    problems: list[Problem] = field(default_factory=list)
    looked_at: float = 0.0  # Unix seconds

    @property
    def is_there(self) -> bool:
        """Its files are there, and its Python answers. A package may still be missing: then a run says which."""
        return bool(self.home and self.python_version)

    @property
    def is_usable(self) -> bool:
        return bool(self.home) and all(problem.is_warning for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Self:
        """As `as_json` wrote it; what another version of LoRA Pilot has stored beside that is passed by."""
        known = {one.name for one in fields(cls)}
        values = {name: value for name, value in kept.items() if name in known}
        return cls(**{**values, "problems": [Problem(**problem) for problem in kept.get("problems", [])]})


# --- What a stack asks ------------------------------------------------------------------------------------------------
def home_of(key: str) -> Path | None:
    """The trainer's folder as the settings name it; None: not installed."""
    if key == "builtin":
        return Path(settings.BASE_DIR)
    home = settings.TRAINERS[key]["home"]
    return Path(home).expanduser().absolute() if home else None


def python_of(key: str) -> Path | None:
    """The trainer's own Python: as the settings name it, or that of a `venv` or `.venv` in its folder. Never ours."""
    if key == "builtin":
        return Path(sys.executable)
    if given := settings.TRAINERS[key]["python"]:
        return Path(given).expanduser().absolute()  # not resolved: a venv's Python is a link
    home = home_of(key)
    found = [home / venv / "bin" / "python" for venv in VENVS] if home else []
    return next((python for python in found if python.exists()), None)


def program_of(key: str) -> tuple[Path, Path]:
    """Its folder and its Python; names that stand for them where it is not installed, so that a configuration can be
    shown all the same."""
    home = home_of(key) or Path(f"/{key.upper()}_HOME")
    return home, python_of(key) or home / "venv" / "bin" / "python"


def is_installed(key: str) -> bool:
    """Its folder and its Python are there. Whether it works is another question: `look_at`."""
    return _obstacle(key) is None


def installation_error(key: str) -> str:
    """A sentence why the trainer cannot be started here, and what to do; empty when its files are there."""
    problem = _obstacle(key)
    return f"{problem.what} `manage.py doctor` on that host names the commands that mend it." if problem else ""


def _obstacle(key: str) -> Problem | None:
    """Why it cannot be started, by its files alone."""
    trainer, home, python = TRAINERS[key], home_of(key), python_of(key)
    prefix = key.upper()
    if home is None:
        return Problem(f"{trainer.name} is not installed.", _how_to_install(key))
    if not (home / trainer.script).is_file():
        return Problem(f"{prefix}_HOME names a folder without {trainer.script}.", _how_to_install(key, home))
    if python is None:
        return Problem(f"{trainer.name} has no Python of its own.", _how_to_make_a_venv(key, home))
    if not os.access(python, os.X_OK):
        return Problem(f"{prefix}_PYTHON names no program.", f"ls -l {shlex.quote(str(python))}")
    return None


# --- What a host asks -------------------------------------------------------------------------------------------------
_kept: dict[str, tuple[object, float, Installation]] = {}


def look_at(key: str, *, has_gpu: bool = False, is_fresh: bool = False) -> Installation:
    """What is installed, asked of the trainer's own Python (at most 30 seconds).

    `has_gpu`: this machine has one, so a PyTorch that sees none is a fault. The answer is kept for 10 minutes in this
    process, or until its commit or its Python changes; `is_fresh` asks in any case.
    """
    home, python = home_of(key), python_of(key)
    commit = _commit(home) if home else ""
    stamp = (home, python, _changed_at(python), commit, has_gpu)
    if key in _kept and not is_fresh:
        kept_stamp, kept_at, kept = _kept[key]
        if kept_stamp == stamp and time.monotonic() - kept_at < KEPT_SECONDS:
            return kept
    found = _look(key, home, python, commit, has_gpu=has_gpu)
    _kept[key] = (stamp, time.monotonic(), found)
    return found


def look_at_all(*, has_gpu: bool, is_fresh: bool = False) -> dict[str, Installation]:
    return {key: look_at(key, has_gpu=has_gpu, is_fresh=is_fresh) for key in TRAINERS}


def _look(key: str, home: Path | None, python: Path | None, commit: str, *, has_gpu: bool) -> Installation:
    trainer, obstacle = TRAINERS[key], _obstacle(key)
    if home is None or not (home / trainer.script).is_file():
        return Installation(home=str(home or ""), problems=[obstacle] if obstacle else [], looked_at=time.time())
    version = _version(trainer, home, commit)
    problems = _problems_of_version(trainer, home, version, commit) + _problems_of_submodules(home)
    answer: dict[str, Any] = {}
    if python is None or obstacle is not None:
        problems += [obstacle] if obstacle else []
    else:
        # Our own PyTorch is proven by every run; without a GPU it takes seconds to load and has nothing to tell.
        answer = _ask(python, trainer, load_torch=has_gpu or key != "builtin")
        problems += _problems_of_python(key, home, python, answer, has_gpu=has_gpu)
    return Installation(
        home=str(home),
        python=str(python or ""),
        version=version,
        commit=commit,
        python_version=answer.get("python", ""),
        torch=answer.get("torch", ""),
        cuda=answer.get("cuda", ""),
        gpus=answer.get("gpus", 0),
        error=answer.get("error", "") or answer.get("torch_error", ""),
        problems=problems,
        looked_at=time.time(),
    )


def _changed_at(python: Path | None) -> int:
    try:
        return python.stat().st_mtime_ns if python else 0
    except OSError:
        return 0


def _ask(python: Path, trainer: Trainer, *, load_torch: bool) -> dict[str, Any]:
    """What the trainer's Python says; `error` when it says nothing that can be read."""
    argv = [str(python), "-I", "-c", PROBE, "1" if load_torch else "0", *trainer.needs, *trainer.wants]
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_SECONDS, check=False
        )
        answer = json.loads(done.stdout.decode(errors="replace").rstrip().rpartition("\n")[2])
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PROBE_SECONDS} seconds"}
    except OSError as error:
        return {"error": error.strerror or str(error)}
    except ValueError:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return {"error": said[:300] or f"exit code {done.returncode}, without a word"}
    return answer if isinstance(answer, dict) else {"error": "an answer that cannot be read"}


def _problems_of_python(
    key: str, home: Path, python: Path, answer: Mapping[str, Any], *, has_gpu: bool
) -> list[Problem]:
    trainer = TRAINERS[key]
    if answer.get("error"):
        return [Problem("Its Python does not answer.", shlex.join([str(python), "-I", "-c", "import torch"]))]
    problems = []
    missing = [name for name in trainer.needs if name in answer["missing"]]
    if missing:
        problems.append(Problem(f"Missing in its Python: {', '.join(missing)}.", _how_to_fill(key, home, python)))
    if answer.get("torch_error"):
        problems.append(Problem("Its PyTorch cannot be loaded.", _how_to_replace_torch(trainer, python)))
    if has_gpu and "gpus" in answer and not answer["gpus"]:
        kind = "built without CUDA" if not answer.get("cuda") else f"for CUDA {answer['cuda']}"
        what = f"Its PyTorch {answer['torch']} ({kind}) sees no GPU, although this machine has one."
        problems.append(Problem(what, _how_to_replace_torch(trainer, python)))
    if trainer.needs_gpu and not has_gpu:
        problems.append(Problem(f"{trainer.name} trains on NVIDIA GPUs only; this machine has none.", is_warning=True))
    wanted = [name for name in trainer.wants if name in answer["missing"]]
    if wanted:
        what = f"Some optimizers cannot be chosen without: {', '.join(wanted)}."
        problems.append(Problem(what, _how_to_fill(key, home, python), is_warning=True))
    return problems


def _problems_of_version(trainer: Trainer, home: Path, version: str, commit: str) -> list[Problem]:
    if not trainer.tested_commit or commit.startswith(trainer.tested_commit):
        return []
    if not commit and version and version == trainer.tested_version:  # an unpacked archive
        return []
    known = " ".join(filter(None, (version, f"({commit[:8]})" if commit else "")))
    is_here = f"This is {known}." if known else "Which version this is cannot be told."
    folder = shlex.quote(str(home))
    mend = f"git -C {folder} fetch --tags && git -C {folder} checkout {trainer.tested_commit}" if commit else ""
    tested = f"LoRA Pilot was tested with {trainer.name} {trainer.tested}."
    return [Problem(f"{is_here} {tested}", mend, is_warning=True)]


def _problems_of_submodules(home: Path) -> list[Problem]:
    """Folders that git was not told to fill."""
    modules = _read(home / ".gitmodules")
    paths = re.findall(r"^\s*path\s*=\s*(\S+)\s*$", modules, re.MULTILINE)
    empty = [Path(path).name for path in paths if not _has_files(home / path)]
    if not empty:
        return []
    mend = f"git -C {shlex.quote(str(home))} submodule update --init --recursive"
    return [Problem(f"Its submodules are not there: {', '.join(empty)}.", mend)]


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


# --- Commands ---------------------------------------------------------------------------------------------------------
def _how_to_install(key: str, home: Path | None = None) -> str:
    trainer = TRAINERS[key]
    if not trainer.repository:
        return "git checkout -- ."
    folder = home or Path("/opt") / trainer.repository.rpartition("/")[2]
    return "\n".join(
        [
            f"git clone --recurse-submodules {trainer.repository} {shlex.quote(str(folder))}",
            f"git -C {shlex.quote(str(folder))} checkout {trainer.tested_commit}",
            _how_to_make_a_venv(key, folder),
            *(
                [f"echo {key.upper()}_HOME={shlex.quote(str(folder))} >> {settings.BASE_DIR / '.env'}"]
                if home is None
                else []
            ),
        ]
    )


def _how_to_make_a_venv(key: str, home: Path) -> str:
    packages = f"{TRAINERS[key].torch} -r requirements.txt"
    return f"(cd {shlex.quote(str(home))} && python3 -m venv venv && venv/bin/pip install {packages})"


def _how_to_fill(key: str, home: Path, python: Path) -> str:
    packages = f"{TRAINERS[key].torch} -r requirements.txt".strip()
    return f"(cd {shlex.quote(str(home))} && {shlex.quote(str(python))} -m pip install {packages})"


def _how_to_replace_torch(trainer: Trainer, python: Path) -> str:
    return f"{shlex.quote(str(python))} -m pip install --force-reinstall {trainer.torch or 'torch'}"


# --- Versions, read from files: git may not be installed, and refuses folders of other owners -------------------------
def _version(trainer: Trainer, home: Path, commit: str) -> str:
    """By its version file, its tag, or because we know the commit."""
    if trainer.version_file:
        found = re.search(r"""VERSION\s*=\s*["']([^"']+)["']""", _read(home / trainer.version_file))
        return found[1] if found else ""
    tags = [ref.removeprefix("refs/tags/") for ref, target in _refs(home).items() if target == commit and commit]
    if trainer.tested_commit and commit.startswith(trainer.tested_commit):
        return trainer.tested_version
    return next(iter(sorted(tags, reverse=True)), "")


def _commit(home: Path) -> str:
    """Of what is checked out, as 40 hex digits; empty for a folder that is no git repository."""
    head = _read(_git_folder(home) / "HEAD").strip()
    if not head.startswith("ref: "):
        return head if re.fullmatch(r"[0-9a-f]{40}", head) else ""
    return _refs(home, only=head.removeprefix("ref: ")).get(head.removeprefix("ref: "), "")


def _git_folder(home: Path) -> Path:
    """`.git`, or the folder that a file `.git` names: that of a worktree or a submodule."""
    git = home / ".git"
    if git.is_file():
        return (home / _read(git).strip().removeprefix("gitdir: ")).resolve()
    return git


def _refs(home: Path, *, only: str = "") -> dict[str, str]:
    """Commits by ref: tags (of annotated ones, what they point to), or the one ref `only`."""
    git = _git_folder(home)
    common = git / (_read(git / "commondir").strip() or ".")
    refs: dict[str, str] = {}
    last = ""
    for line in _read(common / "packed-refs").splitlines():
        if line.startswith("^"):
            refs[last] = line[1:]
        elif not line.startswith("#") and " " in line:
            commit, _, last = line.partition(" ")
            refs[last] = commit
    if only:
        loose = _read(git / only).strip() or _read(common / only).strip()
        return {only: loose or refs.get(only, "")}
    refs |= {f"refs/tags/{file.name}": _read(file).strip() for file in (common / "refs" / "tags").glob("*")}
    return {ref: commit for ref, commit in refs.items() if ref.startswith("refs/tags/")}


def _read(path: Path) -> str:
    """A small file's text; empty when there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
