"""Which batches a step uses, also after a resume with other batches."""

import itertools

import pytest

from lora_trainer.buckets import Placement
from lora_trainer.config import TrainingConfig
from lora_trainer.data import BatchOrder, Dataset, Picture
from lora_trainer.plan import Place, Plan, make_plan


def used(plan, first, last):
    """(epoch, batch) of every batch of these steps, in order."""
    batches = [(step, plan.batches_of(step)) for step in range(first, last)]
    return [
        (plan.epoch_of(step), number) for step, chosen in batches for number in range(plan.batches_per_epoch)[chosen]
    ]


@pytest.mark.parametrize("accumulation", [1, 2, 3, 7])
def test_every_batch_comes_once_an_epoch_and_in_order(accumulation):
    plan = Plan(total_steps=100, batches_per_epoch=5, accumulation=accumulation)
    steps = 3 * plan.steps_per_epoch
    assert used(plan, 0, steps) == list(itertools.product(range(3), range(5)))
    assert [step for step in range(steps + 1) if plan.ends_epoch(step)] == [
        epoch * plan.steps_per_epoch for epoch in (1, 2, 3)
    ]


@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("step", range(9))
def test_plan_that_starts_where_it_would_be_anyway_is_the_same(accumulation, step):
    whole = Plan(total_steps=20, batches_per_epoch=5, accumulation=accumulation)
    start = Place(step, whole.epoch_of(step), whole.batches_of(step).start)
    resumed = Plan(total_steps=20, batches_per_epoch=5, accumulation=accumulation, start=start)
    assert used(resumed, step, 20) == used(whole, step, 20)
    assert [resumed.ends_epoch(one) for one in range(step, 20)] == [whole.ends_epoch(one) for one in range(step, 20)]
    assert resumed.epoch_of(max(0, step - 1)) == whole.epoch_of(max(0, step - 1))
    assert resumed.epochs == whole.epochs


def test_resumed_plan_finishes_the_epoch_and_goes_on_with_whole_ones():
    plan = Plan(total_steps=20, batches_per_epoch=5, accumulation=2, start=Place(step=7, epoch=3, batch=2))
    assert used(plan, 7, 12) == [(3, 2), (3, 3), (3, 4), *((4, batch) for batch in range(5))]
    assert [step for step in range(7, 13) if plan.ends_epoch(step)] == [9, 12]
    assert [step for step in range(7, 13) if plan.is_due(step, epochs=2)] == [9]


def test_epochs_that_are_wanted_decide_the_steps_of_a_resumed_run():
    config = TrainingConfig(
        pretrained_model_name_or_path="m", output_dir="o", max_train_epochs=4, gradient_accumulation_steps=2
    )
    assert make_plan(config, 5).total_steps == 12
    # two steps for batches 1 to 4 of the third epoch, three for the fourth
    assert make_plan(config, 5, Place(step=11, epoch=2, batch=1)).total_steps == 16
    assert make_plan(config, 5, Place(step=11, epoch=2, batch=1)).epochs == 4


# --- the place in an epoch of other batches ---------------------------------------------------------------------------


def order(batch_size, *buckets, rank=0, world_size=1):
    """Of as many pictures in each bucket."""
    pictures = [
        Picture(None, "", 1, "", (64, 64), Placement(bucket=(64, 64 + 8 * number), resized=(64, 64), crop=(0, 0)))
        for number, count in enumerate(buckets)
        for _ in range(count)
    ]
    return BatchOrder(Dataset(pictures), batch_size, 1, rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_same_batches_are_taken_up_at_the_very_place(batch_size, world_size):
    batches = order(batch_size, 5, 4, 1, world_size=world_size)
    for epoch in range(3):
        places = range(batches.batches_per_epoch + 1)
        assert [batches.batch_after(epoch, batches.images_before(epoch, place)) for place in places] == list(places)


def test_images_are_counted_over_all_processes():
    alone = order(2, 5, 4, 1)
    two = order(2, 5, 4, 1, rank=1, world_size=2)
    assert two.batches_per_epoch == 3
    assert [two.images_before(0, place) for place in range(4)] == [
        sum(map(len, alone.epoch(0)[:count])) for count in (0, 2, 4, 6)
    ]
    assert two.images_before(0, 3) == 10


@pytest.mark.parametrize("images", range(11))
def test_smaller_batches_go_on_after_as_many_pictures(images):
    batches = order(2, 5, 4, 1)
    place = batches.batch_after(0, images)
    assert batches.images_before(0, place) in (images, images + 1)
    assert order(1, 5, 4, 1).batch_after(0, images) == images
