"""The folders of saved states, from the outside: which of them are complete. Torch-free: whoever restarts a run looks
for the newest one.

Guarantee: COMPLETE is written last, and lists each file of the folder with its size. So a folder that was copied in
part, or lost the end of a file, is not taken for a state.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

COMPLETE = "COMPLETE"
FILES = ("lora.safetensors", "training.pt", "state.json")
_NAME = re.compile(r"step(\d{8,})")


def state_folder(folder: Path, step: int) -> Path:
    """Where the state of a step lies."""
    return folder / f"step{step:08d}"


def with_proof(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a state and, last, the one by which `is_complete` knows that they are all there."""
    sizes = {name: len(content) for name, content in files.items()}
    return {**files, COMPLETE: json.dumps({"files": sizes}).encode()}


def is_complete(path: Path) -> bool:
    """Whether each file that COMPLETE lists is there in its size. Up to format 2, COMPLETE was empty."""
    try:
        proof = (path / COMPLETE).read_bytes()
        if not proof:
            return all((path / name).is_file() for name in FILES)
        sizes = json.loads(proof)["files"]
        return sizes.keys() >= set(FILES) and all(
            (path / name).is_file() and (path / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def complete_states(folder: Path) -> list[tuple[Path, int]]:
    """(path, step) of the complete states in a run's folder `state`, the newest step first; none when it is missing."""
    named = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("step*"))
    found = [(path, int(name[1])) for path, name in named if name and is_complete(path)]
    return sorted(found, key=lambda one: one[1], reverse=True)
