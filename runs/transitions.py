"""The one function that changes Run.status.

Guarantee: of several callers that want to leave the same status, one wins; the others get False and nothing is written.
The event row is written in the same transaction; viewers are woken after it commits.
"""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from lorapilot.models import User
from runs import wakeup
from runs.enums import ACTIVE, EDGES, TERMINAL, Status
from runs.models import Run, RunEvent

NO_LONGER_ACTIVE: dict[str, Any] = {
    "slot": None,
    "stop_requested_at": None,
    "stop_requested_by": None,
    "stop_intent": "",
    "kill_requested_at": None,
    "stage": "",
    "eta_seconds": None,
}


@transaction.atomic
def change_status(
    run: Run,
    *,
    old: Status,
    new: Status,
    actor: User | None = None,
    message: str = "",
    **values: Any,
) -> bool:
    """Move `run` from `old` to `new`, with `values` for other fields; True when this caller did it.

    Only a run of the attempt that `run` carries is moved: a result of an earlier attempt changes nothing. Raises
    ValueError for an edge that does not exist, and IntegrityError when the slot given in `values` is taken.
    """
    if new not in EDGES[old]:
        raise ValueError(f"A run never goes from {old} to {new}.")
    values |= {"finished_at": timezone.now() if new in TERMINAL else None}
    if new not in ACTIVE:
        values |= NO_LONGER_ACTIVE
    unchanged = Run.objects.filter(pk=run.pk, status=old, attempt=run.attempt)
    if not unchanged.update(status=new, revision=F("revision") + 1, **values):
        return False
    attempt = values.get("attempt", run.attempt)
    RunEvent.objects.create(
        run_id=run.pk, attempt=attempt, old_status=old, new_status=new, actor=actor, message=message
    )
    run.refresh_from_db()
    transaction.on_commit(lambda: wakeup.wake(run.pk))
    return True
