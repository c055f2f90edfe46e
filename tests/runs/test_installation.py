"""What is told of trainers that an operator has installed: stand-in folders, with a real venv of stand-in packages."""

import json
import os
import sys
import venv

import pytest

from runs.stacks import installation
from runs.stacks.installation import TRAINERS, Installation, Problem, look_at

TESTED = "48d368fa" + "0" * 32
OTHER = "0123abcd" + "0" * 32
TORCH = """
__version__ = "2.6.0"
class version: cuda = {cuda!r}
class cuda:
    is_available = staticmethod(lambda: {gpus} > 0)
    device_count = staticmethod(lambda: {gpus})
print("what a library says when it is loaded")
"""


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(installation, "_kept", {})


@pytest.fixture
def home(tmp_path, settings):
    """sd-scripts as it was tested, without a Python."""
    folder = tmp_path / "sd scripts"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text(f"{TESTED}\n")
    (folder / "train_network.py").touch()
    settings.TRAINERS = settings.TRAINERS | {"kohya": {"home": str(folder), "python": ""}}
    return folder


@pytest.fixture
def packages(home):
    """Its venv's packages: empty ones for all that it needs and wants, and a PyTorch for a GPU that it sees."""
    venv.create(home / "venv", symlinks=True, with_pip=False)
    folder = next((home / "venv").glob("lib/python*/site-packages"))
    for name in (*TRAINERS["kohya"].needs, *TRAINERS["kohya"].wants):
        (folder / name).mkdir()
    set_torch(folder)
    return folder


def set_torch(folder, *, cuda="12.4", gpus=1, text=TORCH):
    (folder / "torch" / "__init__.py").write_text(text.format(cuda=cuda, gpus=gpus) if text is TORCH else text)


def set_python(home, script):
    """A Python that is a shell script."""
    python = home / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return python


def whats(found):
    return [problem.what for problem in found.problems]


# --- By files alone ---------------------------------------------------------------------------------------------------
def test_trainer_without_a_folder_is_not_installed(settings):
    found = look_at("kohya")
    assert (found.home, found.is_usable, installation.is_installed("kohya")) == ("", False, False)
    assert installation.home_of("kohya") is None
    sentence = "Kohya sd-scripts is not installed. `manage.py doctor` on that host names the commands that mend it."
    assert installation.installation_error("kohya") == sentence
    assert found.problems[0].mend.splitlines() == [
        "git clone --recurse-submodules https://github.com/kohya-ss/sd-scripts /opt/sd-scripts",
        "git -C /opt/sd-scripts checkout 48d368fa",
        "(cd /opt/sd-scripts && python3 -m venv venv && venv/bin/pip install torch torchvision -r requirements.txt)",
        f"echo KOHYA_HOME=/opt/sd-scripts >> {settings.BASE_DIR}/.env",
    ]


def test_folder_of_something_else_is_told(home):
    (home / "train_network.py").unlink()
    found = look_at("kohya")
    assert (found.home, found.is_usable) == (str(home), False)
    assert whats(found) == ["KOHYA_HOME names a folder without train_network.py."]


def test_trainer_needs_a_python_of_its_own(home, settings):
    found = look_at("kohya")
    assert (found.commit, found.version, found.is_usable) == (TESTED, "v0.10.1", False)
    assert whats(found) == ["Kohya sd-scripts has no Python of its own."]
    assert found.problems[0].mend.startswith(f"(cd '{home}' && python3 -m venv venv && ")
    settings.TRAINERS["kohya"]["python"] = str(home / "nowhere")
    assert whats(look_at("kohya")) == ["KOHYA_PYTHON names no program."]
    assert installation.is_installed("kohya") is False


def test_python_is_found_in_the_folder_or_where_the_settings_say(home, settings):
    own = set_python(home, "exit 0")
    assert (installation.python_of("kohya"), installation.is_installed("kohya")) == (own, True)
    assert installation.installation_error("kohya") == ""
    settings.TRAINERS["kohya"]["python"] = sys.executable
    assert str(installation.python_of("kohya")) == sys.executable


# --- By its Python ----------------------------------------------------------------------------------------------------
def test_complete_trainer_tells_what_it_is(home, packages):
    found = look_at("kohya", has_gpu=True)
    assert found == Installation(
        home=str(home),
        python=str(home / "venv" / "bin" / "python"),
        version="v0.10.1",
        commit=TESTED,
        python_version=".".join(map(str, sys.version_info[:3])),
        torch="2.6.0",
        cuda="12.4",
        gpus=1,
        looked_at=found.looked_at,
    )
    assert found.is_usable
    kept = json.loads(json.dumps(found.as_json()))
    assert Installation.from_json(kept | {"of_a_later_version": 1}) == found


def test_builtin_trainer_is_complete_here():
    found = look_at("builtin")
    assert (found.problems, found.home, found.python) == ([], str(installation.home_of("builtin")), sys.executable)
    assert found.torch


def test_missing_packages_are_named_with_the_command_that_installs_them(home, packages):
    for name in ("cv2", "voluptuous", "bitsandbytes"):
        (packages / name).rmdir()
    python = home / "venv" / "bin" / "python"
    mend = f"(cd '{home}' && '{python}' -m pip install torch torchvision -r requirements.txt)"
    assert look_at("kohya").problems == [
        Problem("Missing in its Python: cv2, voluptuous.", mend),
        Problem("Some optimizers cannot be chosen without: bitsandbytes.", mend, is_warning=True),
    ]


@pytest.mark.parametrize(
    ("cuda", "kind"), [("", "built without CUDA"), ("12.4", "for CUDA 12.4")], ids=["cpu build", "cuda build"]
)
def test_pytorch_that_sees_no_gpu_is_a_fault_only_where_there_is_one(home, packages, cuda, kind):
    set_torch(packages, cuda=cuda, gpus=0)
    assert look_at("kohya", has_gpu=False).is_usable
    found = look_at("kohya", has_gpu=True)
    assert whats(found) == [f"Its PyTorch 2.6.0 ({kind}) sees no GPU, although this machine has one."]
    assert (found.is_usable, found.gpus) == (False, 0)


def test_pytorch_that_cannot_be_loaded_is_told_without_folders(home, packages):
    set_torch(packages, text="raise ImportError('/opt/libcudart.so: cannot open')")
    found = look_at("kohya")
    assert (whats(found), found.error) == (
        ["Its PyTorch cannot be loaded."],
        "ImportError: /opt/libcudart.so: cannot open",
    )
    assert found.problems[0].mend.endswith("-m pip install --force-reinstall torch torchvision")


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo hello", "exit code 0, without a word"),
        ("echo '[1]'", "an answer that cannot be read"),
        ("echo first >&2; echo the last line >&2; exit 3", "the last line"),
    ],
)
def test_python_that_does_not_answer_is_told(home, script, error):
    set_python(home, script)
    found = look_at("kohya")
    assert (whats(found), found.error, found.is_usable) == (["Its Python does not answer."], error, False)


def test_python_that_hangs_is_not_waited_for(home, monkeypatch):
    set_python(home, "exec sleep 60")
    monkeypatch.setattr(installation, "PROBE_SECONDS", 0.1)
    found = look_at("kohya")
    assert (whats(found), found.error) == (["Its Python does not answer."], "no answer within 0.1 seconds")


def test_its_python_gets_nothing_of_our_environment(home, packages, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "ours")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen = tmp_path / "seen.json"
    told = "json.dumps([dict(os.environ), sys.path, sys.flags.isolated])"
    set_torch(packages, text=f"import json, os, sys; open({str(seen)!r}, 'w').write({told})")
    look_at("kohya")
    environment, path, isolated = json.loads(seen.read_text())
    ours = set(os.environ) - set(installation.PASSED_ON)
    assert set(environment) & ours - {"PYTHONDONTWRITEBYTECODE"} == set()
    assert (str(tmp_path) in path, isolated) == (False, 1)


def test_diffusion_pipe_warns_where_there_is_no_gpu(tmp_path, settings):
    home = tmp_path / "pipe"
    (home / "submodules" / "ComfyUI").mkdir(parents=True)
    (home / "submodules" / "Cosmos").mkdir()
    (home / "submodules" / "Cosmos" / "README.md").touch()
    (home / "train.py").touch()
    (home / ".gitmodules").write_text(
        '[submodule "a"]\n\tpath = submodules/ComfyUI\n\turl = x\n[submodule "b"]\n\tpath = submodules/Cosmos\n'
    )
    set_python(home, 'echo; echo \'{"python": "3.12.1", "missing": [], "torch": "2.6", "gpus": 0}\'')
    settings.TRAINERS = settings.TRAINERS | {"diffusion_pipe": {"home": str(home), "python": ""}}
    assert look_at("diffusion_pipe").problems == [
        Problem(
            "Which version this is cannot be told. LoRA Pilot was tested with diffusion-pipe 8f83dbf2.", is_warning=True
        ),
        Problem("Its submodules are not there: ComfyUI.", f"git -C {home} submodule update --init --recursive"),
        Problem("diffusion-pipe trains on NVIDIA GPUs only; this machine has none.", is_warning=True),
    ]


# --- Versions ---------------------------------------------------------------------------------------------------------
def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    "files",
    [
        {".git/HEAD": OTHER},
        {".git/HEAD": "ref: refs/heads/main\n", ".git/refs/heads/main": f"{OTHER}\n"},
        {
            ".git/HEAD": "ref: refs/heads/main\n",
            ".git/packed-refs": f"# pack\n{TESTED} refs/heads/a\n{OTHER} refs/heads/main\n",
        },
        {
            ".git": "gitdir: ../git/worktrees/a\n",
            "../git/worktrees/a/HEAD": "ref: refs/heads/main\n",
            "../git/worktrees/a/commondir": "../..\n",
            "../git/refs/heads/main": OTHER,
        },
    ],
    ids=["detached", "loose", "packed", "worktree"],
)  # fmt: skip
def test_commit_is_read_without_git(tmp_path, files):
    home = tmp_path / "home"
    home.mkdir()
    write(home, files)
    assert installation._commit(home) == OTHER


def test_folder_without_git_has_no_commit(tmp_path):
    assert installation._commit(tmp_path) == ""


def test_another_version_is_a_warning_with_the_way_back(home, packages):
    write(home, {".git/HEAD": OTHER, ".git/packed-refs": f"{TESTED} refs/tags/v0.9.9\n^{OTHER}\n"})
    found = look_at("kohya")
    assert (found.version, found.is_usable) == ("v0.9.9", True)
    sentence = "This is v0.9.9 (0123abcd). LoRA Pilot was tested with Kohya sd-scripts v0.10.1 (48d368fa)."
    mend = f"git -C '{home}' fetch --tags && git -C '{home}' checkout 48d368fa"
    assert found.problems == [Problem(sentence, mend, is_warning=True)]


def test_unpacked_archive_is_known_by_its_version_file(tmp_path, settings):
    home = tmp_path / "toolkit"
    write(home, {"run.py": "", "version.py": 'VERSION = "0.12.26"\n'})
    set_python(home, 'echo \'{"python": "3.12.1", "missing": [], "torch": "2.6", "gpus": 0}\'')
    settings.TRAINERS = settings.TRAINERS | {"ai_toolkit": {"home": str(home), "python": ""}}
    found = look_at("ai_toolkit")
    assert (found.version, found.commit, found.problems) == ("0.12.26", "", [])


# --- How often --------------------------------------------------------------------------------------------------------
def test_answer_is_kept_until_something_changes_or_it_is_old(home, tmp_path, monkeypatch):
    asked = tmp_path / "asked"
    set_python(home, f'echo >> {asked}; echo \'{{"python": "3.12.1", "missing": [], "torch": "2.6"}}\'')

    def times():
        return len(asked.read_text().splitlines())

    first = look_at("kohya")
    assert (look_at("kohya"), times()) == (first, 1)
    look_at("kohya", is_fresh=True)
    assert times() == 2
    (home / ".git" / "HEAD").write_text(OTHER)
    assert (look_at("kohya").commit, times()) == (OTHER, 3)
    os.utime(home / ".venv" / "bin" / "python", (1, 1))
    look_at("kohya")
    assert times() == 4
    monkeypatch.setattr(installation, "KEPT_SECONDS", 0)
    look_at("kohya")
    assert times() == 5
