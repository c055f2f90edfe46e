"""A run again with changes: the run form, filled with everything of another run.

Whoever sees a run may use the pictures that it was trained on, also when their dataset is deleted or a stranger's. The
dataset as it is now is offered to those who see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from django import forms
from django.db.models import QuerySet
from django.forms.models import ModelChoiceIterator
from django.http import HttpRequest, QueryDict

from datasets.models import Dataset, DatasetVersion
from lorapilot.access import get_visible, signed_in
from lorapilot.errors import UserError
from lorapilot.models import User
from runs.enums import Priority
from runs.forms import OWN, RunForm
from runs.models import Run
from runs.planning import plan_run
from runs.services import free_name
from runs.spec import DEFAULTS, OPTIONS
from runs.trainpilot import base_of

EXACT = "version"  # instead of a dataset's key

Typed = QueryDict | Mapping[str, Any]


class _VersionFirst(ModelChoiceIterator):  # type: ignore[type-arg]  # generic in the stubs only, as the next
    field: PicturesField

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        version = self.field.version
        many = "" if len(version.pictures) == 1 else "s"
        yield EXACT, f"{version}: its exact {len(version.pictures)} picture{many}"
        yield from super().__iter__()


class PicturesField(forms.ModelChoiceField):  # type: ignore[type-arg]
    """A dataset as it is now, or `version` as it was."""

    iterator = _VersionFirst

    def __init__(self, version: DatasetVersion, queryset: QuerySet[Dataset], **kwargs: Any) -> None:
        self.version = version
        super().__init__(queryset, empty_label=None, **kwargs)

    def label_from_instance(self, obj: Any) -> str:
        return f"{obj}, as it is now" if obj.pk == self.version.dataset_id else str(obj)

    def to_python(self, value: Any) -> Any:
        return self.version if value == EXACT else super().to_python(value)


class CloneForm(RunForm):
    """The run form, for a run that begins as a copy of `origin`."""

    def __init__(self, user: User, origin: Run, data: Typed | None, initial: dict[str, Any]) -> None:
        first = initial_of(origin, user) if data is None else {}
        super().__init__(user, data, initial=first | initial)
        self.origin = origin
        self.fields["dataset"] = PicturesField(
            origin.dataset_version,
            Dataset.objects.visible_to(user),
            help_text="What the run was trained on, or a dataset as it is now.",
        )


def run_form(request: HttpRequest, data: Typed | None = None, initial: dict[str, Any] | None = None) -> RunForm:
    """The form for a new run. `from` in the request names the run that it begins as a copy of; 404 for a stranger's."""
    user = signed_in(request)
    origin = (data or request.GET).get("from")
    if origin is None:
        return RunForm(user, data, initial=initial)
    return CloneForm(user, get_visible(Run, user, pk=origin), data, initial or {})


def initial_of(origin: Run, user: User) -> dict[str, Any]:
    """What the form shows first, by field. High priority is not passed on to those who cannot give it."""
    is_high = origin.priority > Priority.NORMAL
    essentials = {
        "dataset": EXACT,
        "base_model": origin.trained_model.pk,
        "output_name": free_name(origin.output_name),
        "stack": origin.stack,
        "profile": origin.profile,
        "priority": Priority.NORMAL if is_high and not user.is_staff else origin.priority,
    }
    values, options = own_values(origin, user)
    typed = values | {f"{OWN}{key}": value for key, value in options.items()}
    return essentials | {name: as_typed(value) for name, value in typed.items()}


def own_values(run: Run, user: User) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run's settings, and its trainer's own options, that its profile (or the defaults) would not give `user` now;
    all of them when that cannot be told, since its base model or trainer is no longer there."""
    trained = {name: value for name, value in (DEFAULTS | run.spec | run.adaptations).items() if name in OPTIONS}
    try:
        plan = plan_run(
            pictures=run.dataset_version.pictures,
            base_model=run.trained_model,
            profile=run.profile,
            values={},
            stack=run.stack,
            base=base_of(user) if run.profile else None,
            trigger_word=run.dataset_version.trigger_word,
        )
    except UserError:
        return trained, run.options
    return _changed(trained, plan.spec.as_values()), _changed(run.options, plan.options)


def _changed(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in given or given[name] != value}


def as_typed(value: Any) -> str:
    """As a person would fill it into the form's field."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
