"""What the run form as it stands would train, or why it cannot yet: shown beside the form while it is filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from django.conf import settings

from datasets.models import Dataset, DatasetVersion
from lorapilot.errors import UserError
from lorapilot.models import User
from models_registry.models import BaseModel
from runs import disk, planning
from runs.enums import DeviceKind
from runs.forms import ESSENTIALS, RunForm
from runs.memory import expected_bytes
from runs.model_check import Remedy, remedies
from runs.models import Run
from runs.spec import OPTIONS, RunSpec
from runs.stacks import STACKS
from runs.trainpilot import base_of
from runs.waiting import expected_seconds

KOHYA_STEP = 64  # see stacks/kohya.py
KOHYA_BUCKETS = {"min_bucket_reso": "minimum", "max_bucket_reso": "maximum", "bucket_reso_steps": "step"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What would be submitted: by the form, or by a call."""

    user: User
    source: Dataset | DatasetVersion
    base_model: BaseModel
    stack: str
    profile: str
    values: dict[str, Any]
    options: Mapping[str, Any]
    output_name: str = ""
    varied: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Planned:
    """One run of the submission."""

    name: str
    plan: planning.Plan


@dataclass
class Preview:
    runs: list[Planned] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    refusal: UserError | None = None  # of the plan, whose message is among the errors
    stack: str = "builtin"
    base_model: BaseModel | None = None
    remedies: list[Remedy] = field(default_factory=list)  # what could be pulled so that the trainer can use the model
    are_many: bool = False
    dataset: Dataset | None = None
    """None: a version, which nothing can be done about any more."""

    @property
    def buckets(self) -> str:
        """How the trainer sorts pictures, as the query of the dataset's page of quality."""
        spec, own = self.spec, self.plan.options if self.plan else {}
        if spec is None:
            return ""
        query: dict[str, Any] = {"resolution": spec.resolution, "buckets": "on" if spec.enable_bucket else "off"}
        if self.stack == "kohya":
            query["step"] = KOHYA_STEP
            query |= {ours: own[key] for key, ours in KOHYA_BUCKETS.items() if key in own}
            query["upscale"] = "off" if own.get("bucket_no_upscale") else "on"
        return urlencode(query)

    @property
    def plan(self) -> planning.Plan | None:
        return self.runs[0].plan if self.runs else None

    @property
    def spec(self) -> RunSpec | None:
        return self.plan.spec if self.plan else None

    @property
    def device(self) -> str:
        return DeviceKind(self.plan.device).label if self.plan else ""

    @property
    def steps(self) -> int:
        return sum(run.plan.spec.steps for run in self.runs)

    @property
    def seconds(self) -> float | None:
        """Of all runs, by what runs like them took; None when that is not known of one of them."""
        each = [self._seconds(run.plan) for run in self.runs]
        return sum(known) if (known := [one for one in each if one is not None]) and len(known) == len(each) else None

    def _seconds(self, plan: planning.Plan) -> float | None:
        like = Run(
            stack=self.stack,
            base_model=self.base_model,
            device=plan.device,
            spec=plan.spec.as_values(),
            total_steps=plan.spec.steps,
        )
        return expected_seconds(like)

    @property
    def memory_bytes(self) -> int | None:
        if self.plan is None or self.base_model is None:
            return None
        return expected_bytes(self.plan.spec, self.base_model, self.plan.device)

    @property
    def needed_bytes(self) -> int:
        return sum(run.plan.needed_bytes for run in self.runs)

    @property
    def free_bytes(self) -> int:
        """Above the floor."""
        return max(0, disk.free_bytes() - settings.DISK_FLOOR_BYTES)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.free_bytes


def preview_of(form: RunForm) -> Preview:
    """Of a cleaned form, valid or not."""
    chosen = form.cleaned_data
    stack, dataset, base_model = chosen.get("stack") or "builtin", chosen.get("dataset"), chosen.get("base_model")
    errors = _mistyped(form)
    if errors or not dataset or not base_model:
        found = Preview(errors=errors, stack=stack, base_model=base_model, are_many=bool(form.varied()))
        found.dataset = dataset if isinstance(dataset, Dataset) else None
        return found
    return preview_submission(
        Submission(
            user=form.user,
            source=dataset,
            base_model=base_model,
            stack=stack,
            profile=chosen.get("profile", ""),
            values=form.values(),
            options=form.options(),
            output_name=chosen.get("output_name") or "",
            varied=form.varied(),
        )
    )


def preview_submission(asked: Submission) -> Preview:
    """Its runs, or the error and what would bring what is missing."""
    found = Preview(stack=asked.stack, base_model=asked.base_model, are_many=bool(asked.varied))
    found.dataset = asked.source if isinstance(asked.source, Dataset) else None
    try:
        found.runs = _plan_all(asked)
    except UserError as error:
        found.refusal = error
        if error.field == "base_model":
            found.remedies = remedies(STACKS[asked.stack], asked.base_model, asked.user)
        for one in error.all:
            name = OPTIONS[one.field].label if found.are_many and one.field in OPTIONS else ""
            found.errors.append(one.message if not name or name in one.message else f"{name}: {one.message}")
    return found


def _mistyped(form: RunForm) -> list[str]:
    """What is filled in and cannot be read. What is still empty is no error yet."""
    wrong = [name for name in form.errors if name not in ESSENTIALS and name in form.fields]
    return [f"{form.fields[name].label}: {' '.join(map(str, form.errors[name]))}" for name in wrong]


def _pictures(source: Dataset | DatasetVersion) -> list[dict[str, Any]]:
    if isinstance(source, DatasetVersion):
        return list(source.pictures)
    return [dict(picture) for picture in source.pictures.values("caption", "repeats")]


def _plan_all(asked: Submission) -> list[Planned]:
    pictures = _pictures(asked.source)
    base_name = asked.output_name or "…"
    return [
        Planned(
            f"{base_name}{one.suffix}",
            planning.plan_run(
                pictures=pictures,
                base_model=asked.base_model,
                profile=one.profile,
                values=one.values,
                stack=asked.stack,
                options=asked.options,
                base=base_of(asked.user) if one.profile else None,
                trigger_word=asked.source.trigger_word,
            ),
        )
        for one in planning.variations(asked.profile, asked.values, asked.varied)
    ]
