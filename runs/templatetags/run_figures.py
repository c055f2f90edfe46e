"""A run's figures as people read them. runs/static/runs/run.js writes the same while the page is open."""

from __future__ import annotations

import signal
from datetime import datetime
from typing import Any

from django import template
from django.utils import timezone

from runs import selectors
from runs.enums import Profile
from runs.models import Attempt, Host, Run
from runs.stacks import CAPTIONER, STACKS

register = template.Library()
NONE_YET = "–"


@register.filter
def figure(value: float | None) -> str:
    """Four digits."""
    if value is None:
        return NONE_YET
    return f"{value:.4g}" if value and abs(value) < 1e-3 else f"{value:#.4g}"


@register.filter
def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE_YET
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@register.filter
def speed(steps_per_second: float | None) -> str:
    """Below one step a second, seconds per step."""
    if not steps_per_second:
        return NONE_YET
    if steps_per_second < 1:
        return f"{1 / steps_per_second:.1f} s/step"
    return f"{steps_per_second:.1f} steps/s"


@register.filter
def percent(run: Run) -> str:
    return f"{100 * run.step // run.total_steps} %" if run.total_steps else ""


@register.filter
def took(run: Run) -> str:
    """From its last start to its end."""
    if run.started_at is None or run.finished_at is None:
        return NONE_YET
    return duration((run.finished_at - run.started_at).total_seconds())


@register.filter
def lasted(attempt: Attempt) -> str:
    """From its start to its end, or until now."""
    return duration(((attempt.ended_at or timezone.now()) - attempt.created_at).total_seconds())


@register.filter
def from_now(moment: datetime) -> str:
    """A forecast, as exact as it is: `in about 2 h`."""
    minutes = (moment - timezone.now()).total_seconds() / 60
    if minutes < 1:
        return "in a moment"
    if minutes < 55:
        return f"in about {_rounded(minutes)} min"
    if minutes < 36 * 60:
        return f"in about {max(1, round(minutes / 60))} h"
    return f"in about {round(minutes / 60 / 24)} days"


def _rounded(minutes: float) -> int:
    return round(minutes) if minutes < 10 else 5 * round(minutes / 5)


@register.filter
def ago(moment: datetime) -> str:
    return f"{duration((timezone.now() - moment).total_seconds())} ago"


@register.filter
def is_busy(host: Host) -> bool:
    """Whether a run trains there; of a host that comes with its slots' runs."""
    return any(slot.runs.all() for slot in host.slots.all())


@register.filter
def status_label(run: Run) -> str:
    return selectors.status_label(run)


@register.filter
def trained_again(run: Run, state_step: int) -> str:
    """What is lost when the run ends without saving: a part of a sentence."""
    first = state_step + 1
    if run.step < first:
        return "it has trained nothing since its newest saved state"
    steps = f"steps {first:,} to {run.step:,}" if run.step > first else f"step {first:,}"
    return f"{steps} will be trained again"


@register.filter
def exit_code(code: int | None) -> str:
    """With the signal's name when one ended it."""
    if code is None:
        return NONE_YET
    try:
        return f"{code} ({signal.Signals(-code).name})" if code < 0 else str(code)
    except ValueError:
        return str(code)


@register.filter
def setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value not in (None, "") else NONE_YET


@register.filter
def profile_name(key: str) -> str:
    return Profile(key).label if key in Profile.values else "Own values"


@register.filter
def stack_name(key: str) -> str:
    named = STACKS | {CAPTIONER.key: CAPTIONER}
    return named[key].name if key in named else key


@register.filter
def first_line(text: str) -> str:
    """Of a reason: the sentence."""
    return text.partition("\n")[0]


@register.filter
def other_lines(text: str) -> str:
    """What comes behind it: the trainer's last lines."""
    return text.partition("\n")[2]
