"""The trainers that runs can be given to."""

from __future__ import annotations

from lorapilot.errors import UserError
from runs.stacks.ai_toolkit import AiToolkitStack
from runs.stacks.base import Stack
from runs.stacks.builtin import BuiltinStack
from runs.stacks.captioner import CaptionerStack
from runs.stacks.diffusion_pipe import DiffusionPipeStack
from runs.stacks.kohya import KohyaStack

STACKS: dict[str, Stack] = {
    stack.key: stack for stack in (BuiltinStack(), KohyaStack(), AiToolkitStack(), DiffusionPipeStack())
}
CAPTIONER = CaptionerStack()  # uses the queue as they do, and is nothing to train with


def get_stack(key: str) -> Stack:
    if key == CAPTIONER.key:
        return CAPTIONER
    if key not in STACKS:
        raise UserError(f"There is no trainer {key!r}. Choose one of: {', '.join(sorted(STACKS))}.", field="stack")
    return STACKS[key]
