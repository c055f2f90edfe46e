"""The HTTP API that scripts of LoRA Pilot's users call: the documented addresses and field names on our own services.

Each call is thin. Addresses have no slash at the end, and stand outside /api/v1/. docs/scripts-api.md describes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from django.conf import settings
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from datasets.models import Dataset
from datasets.selectors import script_rows
from lorapilot.access import get_editable, get_visible, is_number, signed_in
from lorapilot.errors import Missing, UserError
from lorapilot.models import User
from models_registry.manifest_selectors import manifest_rows, pull_status
from models_registry.models import BaseModel
from models_registry.pulls import start_pull
from models_registry.selectors import find_by_path
from models_registry.services import BUNDLED
from runs import diffusion_pipe_scripts, logfile, parts, services, trainpilot
from runs.device_history import telemetry
from runs.enums import ACTIVE, Profile, Status
from runs.model_check import Item, check_configuration
from runs.models import Run
from runs.planning import why_unavailable
from runs.stacks import get_stack
from runs.stacks.console import plain_lines
from runs.supervision import runner
from runs.tensorboard.sources import tensorboard_sources

LOG_BYTES = 1 << 20
MOST_LINES = 5000
DEFAULT_LINES = 500
MOST_LOOKED_AT = 50  # runs whose process is compared
OPEN = [*ACTIVE, Status.QUEUED]
# How the documentation writes the caller's own base configuration.
DOCUMENTED_TOML = "/opt/pilot/apps/TrainPilot/newlora.toml"


class EmptyContent(UserError):
    status = HTTPStatus.UNPROCESSABLE_ENTITY


class ScriptView(APIView):
    """A documented call. Its body is JSON or a form; its answer an object or a list."""

    def text(self, name: str, default: str = "") -> str:
        value = self.request.data.get(name, default) if isinstance(self.request.data, dict) else default
        if value is None:
            return default
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise UserError(f"{name} is a text.", field=name)
        text = str(value).strip()
        if "\0" in text:
            raise UserError(f"{name} has a null character.", field=name)
        return text


# --- TrainPilot -------------------------------------------------------------------------------------------------------
class TrainPilotStart(ScriptView):
    @extend_schema(request=OpenApiTypes.OBJECT, responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def post(self, request: Request) -> Response:
        """Queue a guided run: with Kohya where it is installed, else with the built-in trainer."""
        user = signed_in(request)
        profile = self.text("profile", Profile.REGULAR) or Profile.REGULAR
        if profile not in Profile.values:
            raise UserError(f"profile is one of {', '.join(Profile.values)}.", field="profile")
        dataset = find_dataset(user, self.text("dataset_name"))
        _check_toml_path(user, self.text("toml_path"))
        base_model = _base_model(user, self.text("base_model"))
        stack = guided_stack(base_model)
        run = services.submit_run(
            user,
            dataset=dataset,
            base_model=base_model,
            output_name=self.text("output_name") or dataset.name.replace(" ", "-"),
            profile=profile,
            stack=stack,
        )
        return Response(started(run) | {"stack": stack})


class TrainPilotStop(ScriptView):
    @extend_schema(request=OpenApiTypes.OBJECT, responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def post(self, request: Request) -> Response:
        """Stop the run that is named, else the caller's newest guided one."""
        run = open_run(signed_in(request), self.text("run"), guided=True)
        if run is None:
            return Response({"status": "noop"})
        services.stop_run(run, actor=signed_in(request))
        return Response({"status": "stopped"})


class TrainPilotLogs(ScriptView):
    @extend_schema(responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def get(self, request: Request) -> Response:
        """The last lines, or with `offset` those from that byte on."""
        run = shown_run(signed_in(request), request.query_params.get("run", ""), guided=True)
        if run is None:
            return Response({"run": None, "lines": [], "running": False, "offset": 0, "exit_code": None})
        lines, offset = log_lines(run, request)
        shown = {"run": run.pk, "lines": lines, "running": run.is_active, "offset": offset}
        return Response(shown | {"exit_code": run.exit_code})


class TrainPilotToml(ScriptView):
    @extend_schema(responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def get(self, request: Request) -> Response:
        """The caller's base configuration."""
        user = signed_in(request)
        return Response({"content": trainpilot.base_text(user), "path": trainpilot.path_of(user)})

    @extend_schema(request=OpenApiTypes.OBJECT, responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def post(self, request: Request) -> Response:
        """Replace it. What cannot be read changes nothing."""
        user = signed_in(request)
        content = request.data.get("content") if isinstance(request.data, dict) else None
        if not isinstance(content, str) or not content.strip():
            raise EmptyContent("content is the TOML, and it is empty.", field="content")
        try:
            trainpilot.save_base(user, content)
        except UserError as error:  # whatever it names, it is in the content
            raise UserError(error.message, field="content") from None
        return self.get(request)


class TrainPilotModelCheck(ScriptView):
    @extend_schema(request=OpenApiTypes.OBJECT, responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def post(self, request: Request) -> Response:
        """Which model files the base configuration names, and which of them are missing."""
        user = signed_in(request)
        _check_toml_path(user, self.text("toml_path"))
        items = [item.as_json() for item in check_configuration(trainpilot.base_text(user))]
        missing = [item for item in items if item["exists"] is False]
        return Response({"toml_path": trainpilot.path_of(user), "items": items, "missing": missing})


def find_dataset(user: User, name: str, *, field: str = "dataset_name") -> Dataset:
    """By its name, or by the folder's name that Kohya's tools give it (`1_name`). The caller's own comes first."""
    if not name:
        raise UserError(f"{field} is required: GET /api/datasets lists yours.", field=field)
    names = [name, name.partition("_")[2]] if name.partition("_")[0].isdecimal() else [name]
    visible = list(Dataset.objects.visible_to(user).filter(name__in=[one for one in names if one]))
    found = sorted(visible, key=lambda dataset: (dataset.owner_id != user.pk, names.index(dataset.name)))
    if not found:
        raise Missing(f"There is no dataset {name!r}: GET /api/datasets lists yours.", field=field)
    if not found[0].pictures.exists():
        raise UserError(f"{found[0].name} has no pictures yet: add some first.", field=field)
    dataset: Dataset = found[0]
    return dataset


def _check_toml_path(user: User, path: str) -> None:
    if path not in ("", DOCUMENTED_TOML, trainpilot.path_of(user)):
        raise UserError(
            f"toml_path can only be {trainpilot.path_of(user)}, your own base configuration: "
            "replace it by POST /api/trainpilot/toml.",
            field="toml_path",
        )


def _base_model(user: User, given: str) -> BaseModel:
    """The one that is named by id, name or path; else that of the base configuration; else the only one there is.

    What the base configuration names is never replaced by something else.
    """
    models = BaseModel.objects.visible_to(user)
    if given:
        return _named_model(models, given)
    items = check_configuration(trainpilot.base_text(user))
    if missing := next((item for item in items if item.exists is False), None):
        raise UserError(missing.reason, field="toml_path")
    if checkpoint := next((item for item in items if item.kind == "checkpoint"), None):
        return _registered(checkpoint)
    found = list(models.filter(architecture__in=get_stack("builtin").architectures))
    brought = [model for model in found if model.path not in BUNDLED] or found
    if len(brought) == 1:
        only: BaseModel = brought[0]
        return only
    raise UserError(
        "Which base model? Write its path as pretrained_model_name_or_path into the base configuration, "
        "or send base_model with its name.",
        field="base_model",
    )


def _named_model(models: Any, given: str) -> BaseModel:
    named = models.filter(pk=given) if is_number(given) else models.filter(name=given)
    found: BaseModel | None = named.first() or find_by_path(given)
    if found is None:
        raise Missing(f"There is no base model {given!r}: GET /api/v1/models/ lists them.", field="base_model")
    return found


def _registered(checkpoint: Item) -> BaseModel:
    found = find_by_path(checkpoint.value)
    if found is None:
        sentence = f"{checkpoint.value} is not registered yet: staff do that on the Models page."
        raise UserError(checkpoint.reason or sentence, field="toml_path")
    return found


def guided_stack(base_model: BaseModel) -> str:
    """Kohya when it is installed, else the built-in trainer."""
    kohya = get_stack("kohya")
    return "kohya" if not why_unavailable(kohya) and base_model.architecture in kohya.architectures else "builtin"


# --- What all of them share -------------------------------------------------------------------------------------------
def started(run: Run) -> dict[str, Any]:
    """The answer to a start. The process's number is known once it runs."""
    run.refresh_from_db()
    is_active = run.status in ACTIVE
    return {"status": "started" if is_active else "queued", "run": run.pk, "pid": pid_of(run) if is_active else None}


def pid_of(run: Run) -> int | None:
    """Of the trainer's process in the run's newest attempt. None before it has one, and for other machines."""
    try:
        record = json.loads((run.attempt_folder() / "runner.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("boot_id") != runner.boot_id():
        return None
    return record.get("trainer_pid")


def runs_of(user: User, *, guided: bool) -> Any:
    """The caller's own, the newest first: guided ones, or those of Diffusion Pipe."""
    own = Run.objects.filter(owner=user).order_by("-pk")
    return own.exclude(profile="") if guided else own.filter(stack="diffusion_pipe")


def open_run(user: User, run_id: str, *, guided: bool, pid: str = "") -> Run | None:
    """One to be stopped: that which is named (404 for a stranger's), else the newest that trains, else the newest that
    waits; None: there is none."""
    if run_id:
        run = get_editable(Run, user, pk=_run_number(run_id))
        return run if run.status in OPEN else None
    found = list(runs_of(user, guided=guided).filter(status__in=OPEN)[:MOST_LOOKED_AT])
    if pid:
        return _with_pid(found, pid)
    active = [run for run in found if run.status in ACTIVE]
    return next(iter(active or found), None)


def shown_run(user: User, run_id: str, *, guided: bool, pid: str = "") -> Run | None:
    """One whose log is asked for: that which is named, else the newest. None: there is none yet."""
    if run_id:
        return get_visible(Run, user, pk=_run_number(run_id))
    newest = runs_of(user, guided=guided)
    if not pid:
        first: Run | None = newest.first()
        return first
    found = _with_pid(newest[:MOST_LOOKED_AT], pid)
    if found is None:
        raise Missing(f"None of your latest runs has the process {pid}: name the run.", field="pid")
    return found


def _with_pid(runs: Iterable[Run], pid: str) -> Run | None:
    _number("pid", pid, least=1)
    return next((run for run in runs if str(pid_of(run)) == pid), None)


def _run_number(text: str) -> int:
    return _number("run", text, least=1)


def log_lines(run: Run, request: Request) -> tuple[list[str], int]:
    """Lines and the byte after them: the last ones, or those from `offset` on. While the run goes on, what has no end
    yet, neither `\\n` nor the `\\r` of a progress bar, waits for the next call."""
    limit = min(_number("limit", request.query_params.get("limit") or str(DEFAULT_LINES), least=1), MOST_LINES)
    offset = request.query_params.get("offset", "")
    begin = _number("offset", offset) if offset else logfile.tail_offset(run.log_path, LOG_BYTES)
    data = logfile.read_at(run.log_path, begin, LOG_BYTES)
    if run.is_active:
        data = data[: _whole_bytes(data)]
    if not offset:
        return _lines(data)[-limit:], begin + len(data)
    ended = data.split(b"\n")
    data = b"\n".join(ended[:limit]) + (b"\n" if len(ended) > limit else b"")
    return _lines(data), begin + len(data)


def _whole_bytes(data: bytes) -> int:
    """Up to the end of the last piece; all of a piece that is longer than one answer."""
    end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
    return len(data) if not end and len(data) == LOG_BYTES else end


def _lines(data: bytes) -> list[str]:
    return plain_lines(data).removesuffix("\n").split("\n") if data else []


def _number(name: str, text: str, *, least: int = 0) -> int:
    if not is_number(text) or int(text) < least:
        raise UserError(f"{name} is a whole number, {least} or more.", field=name)
    return int(text)


# --- Diffusion Pipe ---------------------------------------------------------------------------------------------------
class DiffusionPipeValidate(ScriptView):
    @extend_schema(request=OpenApiTypes.OBJECT, responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def post(self, request: Request) -> Response:
        """Whether the model's files are where the call says."""
        missing = diffusion_pipe_scripts.missing_paths({name: self.text(name) for name in diffusion_pipe_scripts.PATHS})
        return Response({"ok": not missing, "missing": missing})


class DiffusionPipeStart(ScriptView):
    @extend_schema(request=OpenApiTypes.OBJECT, responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def post(self, request: Request) -> Response:
        """Queue a run of Diffusion Pipe. A second one while the caller has one is 409 with its number."""
        user = signed_in(request)
        order = diffusion_pipe_scripts.read_order(request.data)
        dataset = find_dataset(user, order.dataset_name, field="dataset_path")
        try:
            run = diffusion_pipe_scripts.submit(user, order, dataset)
        except diffusion_pipe_scripts.Occupied as error:
            return Response({"detail": error.message, "run": error.run.pk}, status=error.status)
        config = run.folder / f"{run.output_name}.toml"
        return Response(started(run) | {"config": config.relative_to(settings.WORKSPACE).as_posix()})


class DiffusionPipeStop(ScriptView):
    @extend_schema(request=OpenApiTypes.OBJECT, responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def post(self, request: Request) -> Response:
        """Stop the run that is named by `run` or `pid`, else the caller's newest one of Diffusion Pipe."""
        run = open_run(signed_in(request), self.text("run"), guided=False, pid=self.text("pid"))
        if run is None:
            return Response({"status": "noop", "detail": "No Diffusion Pipe run of yours trains or waits."})
        pid = pid_of(run)
        services.stop_run(run, actor=signed_in(request))
        return Response({"status": "stopped", "pid": pid})


class DiffusionPipeLogs(ScriptView):
    @extend_schema(responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def get(self, request: Request) -> Response:
        """The last lines of the run that is named, else of the newest one."""
        query = request.query_params
        run = shown_run(signed_in(request), query.get("run", ""), guided=False, pid=query.get("pid", ""))
        if run is None:
            return Response({"run": None, "pid": None, "lines": []})
        return Response({"run": run.pk, "pid": pid_of(run), "lines": log_lines(run, request)[0]})


# --- Other calls ------------------------------------------------------------------------------------------------------
class DatasetList(ScriptView):
    @extend_schema(responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def get(self, request: Request) -> Response:
        """The caller's datasets, named as Kohya's folders are."""
        return Response(script_rows(signed_in(request)))


class ServiceList(ScriptView):
    @extend_schema(responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def get(self, request: Request) -> Response:
        """The parts of the installation, in short."""
        return Response([_part(part) for part in parts.list_parts(signed_in(request))])


class Telemetry(ScriptView):
    @extend_schema(responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def get(self, request: Request) -> Response:
        """How busy this machine and the GPUs of all hosts are."""
        return Response(telemetry(signed_in(request)))


class TensorBoardStatus(ScriptView):
    @extend_schema(responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def get(self, request: Request) -> Response:
        """For each kind of run: is there anything to show, where, and why not."""
        return Response({"sources": tensorboard_sources(signed_in(request))})


class ModelList(ScriptView):
    @extend_schema(responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def get(self, request: Request) -> Response:
        """The models of the manifest, and which of them are here."""
        return Response([_manifest_row(row) for row in manifest_rows(signed_in(request))])


class PullStart(ScriptView):
    @extend_schema(request=OpenApiTypes.OBJECT, responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def post(self, request: Request, name: str) -> Response:
        """Begin to pull a model of the manifest. Staff only."""
        start_pull(signed_in(request), name, self.text("subdir"), request=request)
        return Response(_pull(pull_status(signed_in(request), name)))


class PullStatusView(ScriptView):
    @extend_schema(responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def get(self, request: Request, name: str) -> Response:
        """How far it is."""
        return Response(_pull(pull_status(signed_in(request), name)))


MANIFEST_FIELDS = (
    "name", "kind", "source", "subdir", "include", "expected_size_bytes", "category", "installed", "size_bytes",
    "target_path",
)  # fmt: skip
PULL_FIELDS = ("name", "state", "progress_pct", "last_line", "error")


def _part(part: parts.Part) -> dict[str, Any]:
    return {"name": part.name, "display": part.display, "state": part.state, "running": part.is_running}


def _manifest_row(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in MANIFEST_FIELDS}


def _pull(status: Any) -> dict[str, Any]:
    return {name: getattr(status, name) for name in PULL_FIELDS}
