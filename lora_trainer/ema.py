"""A running mean of the weights, which is steadier than the weights of any single step."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class Ema:
    """mean ← d · mean + (1 - d) · weights after each step, with d = min(decay, (1 + n) / (10 + n)) after n updates:
    the first weights, which are not trained yet, are soon forgotten. In float32, on the weights' device."""

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self._parameters = list(parameters)
        self._means = [one.detach().to(torch.float32, copy=True) for one in self._parameters]
        self._decay = decay
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of one more step."""
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        # a LoRA has a thousand small tensors: one call for all of them
        torch._foreach_lerp_(self._means, [one.float() for one in self._parameters], 1 - decay)
        self._updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters hold the means. Afterwards their former values are back, bit for bit."""
        with restored_afterwards(self._parameters):
            copy_into(self._parameters, self._means)
            yield

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU in float32, and a count; `torch.load(weights_only=True)` reads them back."""
        return {"updates": self._updates, "means": [one.cpu().clone() for one in self._means]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict` of as many tensors; ValueError otherwise."""
        if [one.shape for one in state["means"]] != [one.shape for one in self._means]:
            raise ValueError("the moving average belongs to another LoRA")
        copy_into(self._means, state["means"])
        self._updates = state["updates"]


@contextlib.contextmanager
def restored_afterwards(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Give the parameters back the values that they had before, bit for bit, whatever happens inside."""
    parameters = list(parameters)
    before = [one.detach().clone() for one in parameters]
    try:
        yield
    finally:
        copy_into(parameters, before)


@torch.no_grad()
def copy_into(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source's values into its target."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
