"""A run's figures as people read them. runs/static/runs/run.js writes the same while the page is open."""

from __future__ import annotations

from typing import Any

from django import template

from runs.models import Run
from runs.stacks import STACKS

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
def setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value not in (None, "") else NONE_YET


@register.filter
def stack_name(key: str) -> str:
    return STACKS[key].name if key in STACKS else key
