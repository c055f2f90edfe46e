"""What is tried, one after another, when memory runs out."""

import pytest

from runs import memory_ladder
from runs.enums import DeviceKind
from runs.memory_ladder import effective, next_rung
from runs.spec import RunSpec


@pytest.fixture(autouse=True)
def with_bitsandbytes(monkeypatch):
    monkeypatch.setattr(memory_ladder, "find_spec", lambda name: name == "bitsandbytes")


def climb(device=DeviceKind.CUDA, **values):
    """Every rung's changes, down to the end."""
    spec = RunSpec(**values).as_values()
    changes, found = {}, []
    while (rung := next_rung(effective(spec, changes), device)) is not None:
        changes |= rung.changes
        found.append(rung.changes)
    return found


def batch(size, accumulation):
    return {"batch_size": size, "gradient_accumulation_steps": accumulation}


CHECKPOINTING, EIGHT_BIT = {"gradient_checkpointing": True}, {"optimizer": "AdamW8bit"}


def test_ladder_goes_from_what_costs_least_to_what_costs_most():
    assert climb(batch_size=4, gradient_accumulation_steps=2) == [CHECKPOINTING, batch(2, 4), batch(1, 8), EIGHT_BIT]


@pytest.mark.parametrize(
    ("size", "accumulation", "expected"),
    [
        (1, 3, []),
        (3, 1, [batch(1, 3)]),
        (6, 1, [batch(3, 2), batch(1, 6)]),
        (5, 2, [batch(2, 5), batch(1, 10)]),
    ],
)
def test_every_update_sees_as_many_pictures_as_before(size, accumulation, expected):
    found = climb(
        DeviceKind.CPU, batch_size=size, gradient_accumulation_steps=accumulation, gradient_checkpointing=True
    )
    assert found == expected
    assert {rung["batch_size"] * rung["gradient_accumulation_steps"] for rung in found} <= {size * accumulation}


def test_resolution_is_lowered_only_with_leave():
    assert climb(DeviceKind.CPU, gradient_checkpointing=True) == []
    found = climb(DeviceKind.CPU, gradient_checkpointing=True, lower_resolution_when_out=True)
    assert found == [{"resolution": side} for side in (768, 576, 384, 256)]


def test_8_bit_needs_its_package(monkeypatch):
    monkeypatch.setattr(memory_ladder, "find_spec", lambda name: None)
    assert climb(gradient_checkpointing=True) == []


def test_an_optimizer_without_an_8_bit_form_keeps_its_own():
    assert climb(gradient_checkpointing=True, optimizer="Prodigy") == []


def test_another_trainer_keeps_its_optimizer_which_has_a_state_of_its_own():
    spec = RunSpec(gradient_checkpointing=True)
    assert next_rung(spec, DeviceKind.CUDA).changes == {"optimizer": "AdamW8bit"}
    assert next_rung(spec, DeviceKind.CUDA, stack="kohya") is None
