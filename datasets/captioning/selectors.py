"""What there is of automatic captions. Who may see a dataset's captionings: who may change the dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db.models import Count, Q, QuerySet, Sum
from django.shortcuts import get_object_or_404

from datasets.captioning.enums import Proposal
from datasets.captioning.options import cost_of
from datasets.models import Captioning, CaptionProposal, Dataset
from datasets.pictures import picture_path
from lorapilot.access import get_editable
from lorapilot.models import JOB_ENDED, User


@dataclass(frozen=True, slots=True)
class Counts:
    """How far an order is, by what became of its pictures."""

    waiting: int
    proposed: int
    failed: int
    accepted: int
    discarded: int
    input_tokens: int
    output_tokens: int

    @property
    def total(self) -> int:
        return self.waiting + self.proposed + self.failed + self.accepted + self.discarded

    @property
    def done(self) -> int:
        return self.total - self.waiting


STATES = {f"count_{state}": Count("proposals", filter=Q(proposals__state=state)) for state in Proposal.values}
TOKENS = {f"sum_{name}": Sum(f"proposals__{name}", default=0) for name in ("input_tokens", "output_tokens")}


def captionings_of(dataset: Dataset) -> QuerySet[Captioning]:
    """Newest first, with what `counts_of` needs."""
    found = Captioning.objects.filter(dataset=dataset).select_related("owner", "job", "dataset")
    counted: QuerySet[Any] = found.annotate(**STATES, **TOKENS).order_by("-pk")
    return counted


def counts_of(captioning: Any) -> Counts:
    """Of one that comes from `captionings_of` or `editable_captioning`."""
    states = {state: getattr(captioning, f"count_{state}") for state in Proposal.values}
    tokens = {name: getattr(captioning, f"sum_{name}") for name in ("input_tokens", "output_tokens")}
    return Counts(**states, **tokens)


def cost_so_far(captioning: Captioning, counts: Counts) -> float | None:
    return cost_of(captioning.options, counts.input_tokens, counts.output_tokens)


def editable_captioning(user: User, *, dataset_id: Any, captioning_id: Any) -> Captioning:
    """Raises Http404 for strangers, NotAllowed for those who may only look."""
    dataset = get_editable(Dataset, user, pk=dataset_id)
    return get_object_or_404(captionings_of(dataset), pk=captioning_id)


def proposals_of(captioning: Captioning, *, state: str = "") -> QuerySet[CaptionProposal]:
    """With their pictures; those in one state, or all."""
    found = captioning.proposals.select_related("picture").order_by("pk")
    return found.filter(state=state) if state else found


def has_job(captioning: Captioning) -> bool:
    """A background job is at it, or is about to be."""
    return captioning.job is not None and captioning.job.status not in JOB_ENDED


def waiting_files(captioning: Captioning | None) -> list[dict[str, Any]]:
    """For a program on a device: `{"image": absolute path, "caption", "repeats"}` of each picture that still waits."""
    if captioning is None:  # its dataset was deleted
        return []
    waiting = proposals_of(captioning, state=Proposal.WAITING)
    rows = waiting.values_list("picture__sha256", "picture__extension", "picture__caption")
    return [
        {"image": str(picture_path(sha256, extension).resolve()), "caption": caption, "repeats": 1}
        for sha256, extension, caption in rows
    ]
