"""What becomes of a run when one of its attempts has ended: it ends, goes back to the queue, or tries with less memory.

The rule: who was asked to stop stops; who was interrupted through no fault of its own goes on from its newest state,
after a growing pause and not for ever; who failed by itself has failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from django.utils import timezone

from runs import memory_ladder, services
from runs.enums import Ending, Status, StopIntent
from runs.models import Attempt, Run
from runs.stacks.base import FORCED, Cause, Outcome

# Before the next attempt, by how many were interrupted in a row without getting any further.
PAUSES = (0, 10, 30, 60, 300)
KILLS_THAT_MEAN_MEMORY = 3  # in a row, although the kernel does not count them as its own
ENDINGS = {
    Cause.KILLED: Ending.INTERRUPTED,
    Cause.OUT_OF_MEMORY: Ending.OUT_OF_MEMORY,
    Cause.DISK_FULL: Ending.DISK_FULL,
}


def ending_of(run: Run, outcome: Outcome) -> Ending:
    """How to call the end of an attempt that ended in `outcome`."""
    if run.status != Status.STOPPING and outcome.status == Status.STOPPED:
        return Ending.INTERRUPTED  # somebody else than us asked it to stop: a shutdown of the machine
    return ENDINGS.get(outcome.cause, Ending(outcome.status))


@dataclass(frozen=True, slots=True)
class End:
    """How an attempt ended: what its stack says, its exit code if it had one, and the newest state that is complete."""

    outcome: Outcome
    code: int | None
    saved_step: int

    @property
    def goes_on(self) -> str:
        return services.where_it_goes_on(self.saved_step)


def conclude(run: Run, attempt: Attempt, end: End) -> None:
    """Move `run` on after `attempt`, whose row has its `ending`. Called in the transaction that closes the attempt."""
    outcome = end.outcome
    if outcome.status == Status.SUCCEEDED:
        services.end(run, Status.SUCCEEDED, code=end.code)
    elif run.status == Status.STOPPING:
        _stopped(run, end)
    elif attempt.ending == Ending.INTERRUPTED:
        _interrupted(run, attempt, end)
    elif attempt.ending == Ending.OUT_OF_MEMORY:
        _out_of_memory(run, outcome.reason, end)
    elif attempt.ending == Ending.DISK_FULL:
        message = f"The disk is full. {end.goes_on} It waits until there is space."
        again = in_a_row(run, attempt, end.saved_step) + 1
        _back_to_queue(run, message, pause_seconds=PAUSES[min(again, len(PAUSES) - 1)])
    else:
        services.end(run, outcome.status, reason=outcome.reason, code=end.code)


def _stopped(run: Run, end: End) -> None:
    """It was asked to stop. However it ended, it does not go on by itself unless it was only to move."""
    outcome = end.outcome
    if outcome.cause == Cause.OWN and outcome.status != Status.STOPPED:
        services.end(run, outcome.status, reason=outcome.reason, code=end.code)
        return
    how = outcome.reason if outcome.cause == Cause.OWN else f"It ended before it had saved. {outcome.reason}"
    if run.stop_intent == StopIntent.PAUSE:
        _back_to_queue(run, f"Paused. {end.goes_on}", is_held=True)
    elif run.stop_intent == StopIntent.MOVE:
        _back_to_queue(run, f"Saved and back in the queue. {end.goes_on}")
    else:
        services.end(run, Status.STOPPED, reason=how, code=end.code)


def _interrupted(run: Run, attempt: Attempt, end: End) -> None:
    before = in_a_row(run, attempt, end.saved_step)
    if before >= KILLS_THAT_MEAN_MEMORY - 1 and end.code in FORCED:
        reason = f"The trainer was killed {before + 1} times without getting any further. Most likely memory ran out."
        Attempt.objects.filter(pk=attempt.pk).update(ending=Ending.OUT_OF_MEMORY)
        _out_of_memory(run, reason, end)
    elif before >= len(PAUSES):
        reason = f"It was interrupted {before + 1} times without getting any further. Find out by what, then resume."
        services.end(run, Status.ERRORED, reason=reason, code=end.code)
    else:
        message = f"Its process was killed from outside, or the machine restarted. {end.goes_on}"
        _back_to_queue(run, message, pause_seconds=PAUSES[before])


def in_a_row(run: Run, attempt: Attempt, saved_step: int) -> int:
    """How many attempts before this one ended and started as it did, if it saved nothing new."""
    if saved_step > attempt.start_step:
        return 0
    count = 0
    for earlier in run.attempts.filter(number__lt=attempt.number).order_by("-number"):
        if earlier.ending != attempt.ending or earlier.start_step != attempt.start_step:
            break
        count += 1
    return count


def _out_of_memory(run: Run, reason: str, end: End) -> None:
    """The next rung of the ladder, with the user's leave; else the end."""
    spec = memory_ladder.effective(run.spec, run.adaptations)
    rung = (
        memory_ladder.next_rung(spec, services.device_of(run), stack=run.stack)
        if run.trains and spec.less_memory_when_out
        else None
    )
    if rung is None:
        services.end(run, Status.FAILED, reason=reason, code=end.code)
        return
    message = f"Memory ran out. {rung.sentence} {end.goes_on}"
    _back_to_queue(run, message, adaptations=run.adaptations | rung.changes)


def _back_to_queue(run: Run, message: str, *, is_held: bool = False, pause_seconds: int = 0, **values: object) -> None:
    now = timezone.now()
    services.requeue(
        run,
        old=Status(run.status),
        actor=None,
        message=message,
        held_at=now if is_held else None,
        not_before=now + timedelta(seconds=pause_seconds) if pause_seconds else None,
        **values,
    )
