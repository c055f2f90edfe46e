"""Every shape against the functions that sd-scripts calls, with the arguments that it calls them with."""

import diffusers.optimization as of_diffusers
import pytest
import torch
import transformers.optimization as of_transformers

from lora_trainer.schedule import SCHEDULES, Schedule

RATE = 2e-4


def library_factor(module, function, **arguments):
    """The library's own function of the finished steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    (factor,) = getattr(module, function)(optimizer, **arguments).lr_lambdas
    return factor


def transformers_factor(name, *, total, warmup=0, decay=0, cycles=1, power=1.0, minimum=0.0):
    span = {"num_warmup_steps": warmup, "num_training_steps": total}
    half_waves = {"num_cycles": cycles / 2}
    stages = {"num_warmup_steps": warmup, "num_stable_steps": total - warmup - decay, "num_decay_steps": decay}
    function, arguments = {
        "constant": ("get_constant_schedule", {}),
        "constant_with_warmup": ("get_constant_schedule_with_warmup", {"num_warmup_steps": warmup}),
        "linear": ("get_linear_schedule_with_warmup", span),
        "cosine": ("get_cosine_schedule_with_warmup", span),
        "cosine_with_restarts": ("get_cosine_with_hard_restarts_schedule_with_warmup", span | {"num_cycles": cycles}),
        "polynomial": ("get_polynomial_decay_schedule_with_warmup", span | {"power": power}),
        "cosine_with_min_lr": (
            "get_cosine_with_min_lr_schedule_with_warmup",
            span | half_waves | {"min_lr_rate": minimum},
        ),
        "warmup_stable_decay": ("get_wsd_schedule", stages | half_waves | {"min_lr_ratio": minimum}),
    }[name]
    return library_factor(of_transformers, function, **arguments)


def assert_same(schedule, wanted):
    for step in range(schedule.total_steps + 1):
        assert schedule.factor(step) == pytest.approx(wanted(step), abs=1e-12), step


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("total", [8, 50])
@pytest.mark.parametrize(("cycles", "minimum", "power"), [(1, 0.0, 1.0), (3, 0.1, 2.5)])
def test_shape_is_that_of_transformers(name, warmup, total, cycles, minimum, power):
    shape = {"cycles": cycles, "minimum": minimum, "power": power}
    decay = 0 if total == 8 else 20
    schedule = Schedule(
        name=name, total_steps=total, warmup_steps=warmup, decay_steps=decay, lowest=1e-7 / RATE, **shape
    )
    assert_same(schedule, transformers_factor(name, total=total, warmup=warmup, decay=decay, **shape))


@pytest.mark.parametrize(
    ("name", "function", "arguments"),
    [
        ("constant_with_warmup", "get_constant_schedule_with_warmup", {}),
        ("linear", "get_linear_schedule_with_warmup", {"num_training_steps": 30}),
        ("cosine", "get_cosine_schedule_with_warmup", {"num_training_steps": 30}),
        (
            "cosine_with_restarts",
            "get_cosine_with_hard_restarts_schedule_with_warmup",
            {"num_training_steps": 30, "num_cycles": 2},
        ),
        ("polynomial", "get_polynomial_decay_schedule_with_warmup", {"num_training_steps": 30, "power": 2.0}),
    ],
)
def test_shape_is_that_of_diffusers_where_it_has_it(name, function, arguments):
    schedule = Schedule(name=name, total_steps=30, warmup_steps=4, cycles=2, power=2.0, lowest=1e-7 / RATE)
    assert_same(schedule, library_factor(of_diffusers, function, num_warmup_steps=4, **arguments))


def test_step_uses_the_rate_that_a_scheduler_would_have_set_by_then():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    scheduler = of_transformers.get_cosine_schedule_with_warmup(optimizer, 2, 10)
    schedule = Schedule(name="cosine", total_steps=10, warmup_steps=2)
    for steps_done in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(RATE * schedule.factor(steps_done), abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_constant_ignores_warm_up():
    schedule = Schedule(name="constant", total_steps=10, warmup_steps=5)
    assert [schedule.factor(step) for step in (0, 3, 9)] == [1, 1, 1]


def test_stable_phase_is_cut_short_by_a_long_decay():
    schedule = Schedule(name="warmup_stable_decay", total_steps=10, warmup_steps=4, decay_steps=8)
    assert_same(schedule, transformers_factor("warmup_stable_decay", total=10, warmup=4, decay=8))
