"""The library of LoRAs, where it meets runs: the final LoRA of each run is in it, with its samples and where it comes
from.

Guarantee: a final checkpoint has a row as soon as it is saved, and again after a kill (reconcile calls `catch_up`); a
run that is deleted takes its row along.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.contrib.auth.models import Group
from django.db.models import Exists, F, OuterRef, Q, Subquery

from datasets.models import Dataset, DatasetVersion
from lorapilot.errors import Missing
from lorapilot.models import User
from models_registry.adapter_services import enter_produced
from models_registry.models import Adapter, BaseModel
from runs import publishing
from runs.models import Checkpoint, Run, Sample

AT_ONCE = 50  # of one round: after an upgrade there may be hundreds


# --- What runs make ---------------------------------------------------------------------------------------------------
def catch_up() -> int:
    """Enter the final LoRAs that the library lacks or has as they were before, and forget those whose run has lost
    them. Idempotent; no open transaction, since headers are read. Returns how many were entered."""
    entered = Adapter.objects.filter(checkpoint=OuterRef("pk")).values("sha256")[:1]
    finals = Checkpoint.objects.filter(is_final=True).annotate(entered=Subquery(entered))
    news = finals.filter(Q(entered=None) | ~Q(entered=F("sha256"))).order_by("pk")
    found = list(news.select_related("run__owner", "run__dataset_version", "run__base_model")[:AT_ONCE])
    for checkpoint in found:
        _enter(checkpoint)
    known = Checkpoint.objects.filter(pk=OuterRef("checkpoint"))
    Adapter.objects.filter(~Exists(known), checkpoint__isnull=False).delete()
    return len(found)


def _enter(checkpoint: Checkpoint) -> Adapter:
    run = checkpoint.run
    base_model = run.base_model
    values = {
        "checkpoint": checkpoint.pk,
        "owner": run.owner,
        "name": run.output_name,
        "sha256": checkpoint.sha256,
        "trigger_word": run.dataset_version.trigger_word,
        "base_model": base_model,
        "base_model_name": base_model.name if base_model else "",
        "architecture": base_model.architecture if base_model else "",
    }
    told = {"bytes": checkpoint.bytes, "rank": run.spec.get("rank") or 0, "alpha": run.spec.get("alpha")}
    path = (run.folder / checkpoint.path).relative_to(settings.WORKSPACE).as_posix()
    return enter_produced(path, values=values, otherwise=told, groups=run.groups.all())


def forget_run(run: Run) -> None:
    """Its LoRAs leave the library. Called inside the transaction that deletes the run."""
    Adapter.objects.filter(checkpoint__in=run.checkpoints.values("pk")).delete()


def share_along(run: Run, *, before: set[Group], after: set[Group]) -> None:
    """Who may now look at the run looks at its LoRA, and who no longer may does not. What the LoRA alone is shared
    with stays."""
    for adapter in Adapter.objects.filter(checkpoint__in=run.checkpoints.values("pk")):
        adapter.groups.add(*after - before)
        adapter.groups.remove(*before - after)
        adapter.editor_groups.remove(*before - after)


# --- Reads ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Origin:
    """Where a LoRA comes from, as far as a user may see it. `has_run`: a run made it, though `run` may be hidden."""

    has_run: bool
    run: Run | None = None
    version: DatasetVersion | None = None
    dataset: Dataset | None = None
    base_model: BaseModel | None = None


def origin_of(adapter: Adapter, user: User) -> Origin:
    """The run whose checkpoint it is, or which saved the very same file, then the dataset version and base model."""
    same = Q(sha256=adapter.sha256) if adapter.checkpoint is None else Q(pk=adapter.checkpoint)
    runs = Run.objects.visible_to(user).filter(pk__in=Checkpoint.objects.filter(same).values("run"))
    run = runs.select_related("dataset_version", "base_model", "owner").order_by("pk").first()
    if run is None:
        return Origin(has_run=adapter.is_produced, base_model=adapter.base_model)
    version: DatasetVersion = run.dataset_version
    dataset = Dataset.objects.visible_to(user).filter(pk=version.dataset_id).first()
    return Origin(has_run=True, run=run, version=version, dataset=dataset, base_model=run.base_model)


def visible_runs(adapters: Iterable[Adapter], user: User) -> dict[int, int]:
    """The key of the run of each of these LoRAs, by the LoRA's key, when `user` may see it."""
    keys = {adapter.checkpoint: adapter.pk for adapter in adapters if adapter.checkpoint is not None}
    seen = Run.objects.visible_to(user).values("pk")
    found = Checkpoint.objects.filter(pk__in=keys, run__in=seen).values_list("pk", "run")
    return {keys[checkpoint]: run for checkpoint, run in found}


def samples_of(adapters: Sequence[Adapter]) -> dict[int, list[Sample]]:
    """What each of these LoRAs draws: the samples of its step, by the LoRA's key. Two queries for any number."""
    keys = {adapter.checkpoint: adapter.pk for adapter in adapters if adapter.checkpoint is not None}
    places = Checkpoint.objects.filter(pk__in=keys).values_list("run", "step", "pk")
    by_place = {(run, step): keys[pk] for run, step, pk in places}
    of_step = Checkpoint.objects.filter(pk__in=keys, run=OuterRef("run"), step=OuterRef("step"))
    found: dict[int, list[Sample]] = {adapter.pk: [] for adapter in adapters}
    for sample in Sample.objects.filter(Exists(of_step)).select_related("run").order_by("index", "pk"):
        found[by_place[sample.run_id, sample.step]].append(sample)
    return found


def lora_of(adapter: Adapter) -> publishing.Lora:
    """As what it is published: a run's final LoRA is the same thing on the run's page and here."""
    if adapter.checkpoint is None:
        return publishing.of_adapter(adapter)
    checkpoint = Checkpoint.objects.select_related("run").filter(pk=adapter.checkpoint).first()
    if checkpoint is None:  # the run is being deleted
        raise Missing(f"The run that made {adapter.name} is gone.")
    return publishing.of_checkpoint(checkpoint)


def adapter_of(run: Run, user: User) -> Adapter | None:
    """The run's final LoRA in the library, when `user` may see it there."""
    found: Any = Adapter.objects.visible_to(user).filter(checkpoint__in=run.checkpoints.values("pk"))
    adapter: Adapter | None = found.first()
    return adapter
