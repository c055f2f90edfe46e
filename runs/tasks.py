"""What django-q2 delivers. Safe to deliver twice: the first line of a slice takes the attempt's lease or returns.

A restart of the workers loses a slice, never a run: reconcile hands out a new one.
"""

from __future__ import annotations

from runs.supervision.follow import supervise_slice


def supervise(attempt_id: int) -> None:
    supervise_slice(attempt_id)
