"""Replaces by a regular expression in a process of its own, so that a pattern that never ends, or that fills the
memory, ends this program and nothing else. Plain Python, started by caption_operations.py; reads and writes JSON.

    {"pattern", "replacement", "captions": […], "longest"}  →  {"captions": […]} or {"error": "a reason"}
"""

from __future__ import annotations

import json
import re
import resource
import sys

CPU_SECONDS = 5
MEMORY_BYTES = 1024**3


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asked = json.load(sys.stdin)
    try:
        answer: dict[str, object] = {"captions": replaced(asked)}
    except (re.error, IndexError, OverflowError, RecursionError, ValueError) as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)


def replaced(asked: dict[str, object]) -> list[str]:
    """What becomes of each caption. Raises ValueError when one grows beyond `longest` characters."""
    pattern, replacement, longest = (
        re.compile(str(asked["pattern"])),
        str(asked["replacement"]),
        int(str(asked["longest"])),
    )
    done = []
    for caption in asked["captions"]:  # type: ignore[attr-defined]  # a list, as the starter wrote it
        text = pattern.sub(replacement, caption)
        if len(text) > longest:
            raise ValueError(f"a caption would have more than {longest:,} characters")
        done.append(text)
    return done


if __name__ == "__main__":
    main()
