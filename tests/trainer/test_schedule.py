import pytest

from lora_trainer.schedule import SCHEDULES, learning_rate_factor


def factors(schedule, steps, *, total=10, warmup=2, cycles=1):
    return [
        learning_rate_factor(schedule, steps_done=step, total_steps=total, warmup_steps=warmup, cycles=cycles)
        for step in steps
    ]


def test_constant_ignores_warmup():
    assert factors("constant", [0, 5, 9]) == [1, 1, 1]


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "constant"])
def test_warmup_rises_linearly_to_one(schedule):
    assert factors(schedule, [0, 1, 2]) == [0, 0.5, 1]


def test_linear_and_cosine_fall_to_zero():
    assert factors("linear", [6, 10]) == [0.5, 0]
    assert factors("cosine", [6, 10]) == pytest.approx([0.5, 0])


def test_cosine_with_restarts_starts_again():
    assert factors("cosine_with_restarts", [2, 4, 6, 8], cycles=2) == pytest.approx([1, 0.5, 1, 0.5])
