"""The HTTP API that scripts of LoRA Pilot's users call: the documented addresses and field names on our own services.

Each call is thin. Addresses have no slash at the end, and stand outside /api/v1/. docs/scripts-api.md describes them.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from datasets.models import Dataset
from lorapilot.access import get_visible, signed_in
from lorapilot.errors import Conflict, Missing, UserError
from lorapilot.models import User
from models_registry.manifest_selectors import manifest_rows, pull_status
from models_registry.models import BaseModel
from models_registry.pulls import start_pull
from models_registry.selectors import find_by_path
from runs import diffusion_pipe_scripts, disk, logfile, parts, services, trainpilot, vitals
from runs.configs import read_configuration
from runs.enums import ACTIVE, Profile, Status
from runs.model_check import check_configuration
from runs.models import Device, Run
from runs.planning import why_unavailable
from runs.stacks import get_stack
from runs.stacks.console import plain_lines
from runs.supervision import runner
from runs.tensorboard.sources import tensorboard_sources

LOG_BYTES = 1 << 20
MOST_LINES = 5000
DEFAULT_LINES = 500
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
        return str(value).strip()


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
            output_name=self.text("output_name") or dataset.name,
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
        run = newest_run(signed_in(request), request.query_params.get("run", ""), guided=True)
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
        trainpilot.save_base(user, content)
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


def find_dataset(user: User, name: str) -> Dataset:
    """By its name, or by the folder's name that Kohya's tools give it (`1_name`). The caller's own comes first."""
    if not name:
        raise UserError("dataset_name is required: GET /api/datasets lists yours.", field="dataset_name")
    names = [name, name.partition("_")[2]] if name.partition("_")[0].isdecimal() else [name]
    visible = list(Dataset.objects.visible_to(user).filter(name__in=[one for one in names if one]))
    found = sorted(visible, key=lambda dataset: (dataset.owner_id != user.pk, names.index(dataset.name)))
    if not found:
        raise Missing(f"There is no dataset {name!r}: GET /api/datasets lists yours.", field="dataset_name")
    if not found[0].pictures.exists():
        raise UserError(f"{found[0].name} has no pictures yet: add some first.", field="dataset_name")
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
    """The one that is named by id, name or path; else that of the base configuration; else the only one there is."""
    models = BaseModel.objects.visible_to(user)
    if given:
        found: BaseModel | None = (
            models.filter(pk=given).first() if given.isdecimal() else models.filter(name=given).first()
        )
        if found or (found := find_by_path(given)):
            return found
        raise Missing(f"There is no base model {given!r}.", field="base_model")
    named = read_configuration("kohya", trainpilot.base_text(user))
    if named.base_model is not None:
        return named.base_model
    if missing := [item for item in check_configuration(trainpilot.base_text(user)) if item.exists is False]:
        raise UserError(missing[0].reason, field="toml_path")
    only: list[BaseModel] = list(models.filter(architecture__in=get_stack("builtin").architectures)[:2])
    if len(only) == 1:
        return only[0]
    raise UserError(
        "Which base model? Write its path as pretrained_model_name_or_path into the base configuration, "
        "or send base_model with its name.",
        field="base_model",
    )


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
    """Of the trainer's process, on its host."""
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
    """The one that is named (404 for a stranger's), else the newest that trains or waits; None: there is none."""
    if run_id:
        run = _named(user, run_id)
        return run if run.status in OPEN else None
    found = list(runs_of(user, guided=guided).filter(status__in=OPEN)[:50])
    if pid:
        return next((run for run in found if str(pid_of(run)) == pid), None)
    active = [run for run in found if run.status in ACTIVE]
    return next(iter(active or found), None)


def newest_run(user: User, run_id: str, *, guided: bool, pid: str = "") -> Run | None:
    if run_id:
        return _named(user, run_id)
    newest = runs_of(user, guided=guided)
    if pid:
        return next((run for run in newest[:50] if str(pid_of(run)) == pid), None)
    found: Run | None = newest.first()
    return found


def _named(user: User, run_id: str) -> Run:
    if not run_id.isdecimal() or len(run_id) > 18:
        raise UserError("run is the number of a run.", field="run")
    return get_visible(Run, user, pk=int(run_id))


def log_lines(run: Run, request: Request) -> tuple[list[str], int]:
    """Lines and the byte after them. Without `offset` the last ones; an unfinished line waits for the next call."""
    limit = _whole_number(request, "limit", DEFAULT_LINES)
    size = logfile.size(run.log_path)
    if request.query_params.get("offset", "") == "":
        begin = max(0, size - LOG_BYTES)
        lines = _lines(logfile.read_at(run.log_path, begin, LOG_BYTES))
        return lines[-min(limit, MOST_LINES) :], size
    begin = _whole_number(request, "offset", 0)
    data = logfile.read_at(run.log_path, begin, LOG_BYTES)
    whole = data if not run.is_active else data[: data.rfind(b"\n") + 1]
    kept = b"\n".join(whole.split(b"\n")[:limit])
    if len(kept) < len(whole):
        kept += b"\n"
    return _lines(kept), begin + len(kept)


def _lines(data: bytes) -> list[str]:
    return plain_lines(data).removesuffix("\n").split("\n") if data else []


def _whole_number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, "") or str(default)
    if not text.isdecimal() or len(text) > 18:
        raise UserError(f"{name} is a whole number, 0 or more.", field=name)
    return int(text)


# --- Diffusion Pipe ---------------------------------------------------------------------------------------------------
class DiffusionPipeValidate(ScriptView):
    @extend_schema(request=OpenApiTypes.OBJECT, responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def post(self, request: Request) -> Response:
        """Whether the model's files are where the call says."""
        given = {name: self.text(name) for name in diffusion_pipe_scripts.PATHS}
        missing = diffusion_pipe_scripts.missing_paths(given)
        return Response({"ok": not missing, "missing": missing})


class DiffusionPipeStart(ScriptView):
    @extend_schema(request=OpenApiTypes.OBJECT, responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def post(self, request: Request) -> Response:
        """Queue a run of Diffusion Pipe. A second one while the caller has one is 409 with its number."""
        user = signed_in(request)
        if (other := open_run(user, "", guided=False)) is not None:
            raise Conflict(f"Run {other.pk} ({other.output_name}) of yours trains or waits already.", field="run")
        order = diffusion_pipe_scripts.read_order(request.data)
        dataset = find_dataset(user, order.dataset_name)
        run = diffusion_pipe_scripts.submit(user, order, dataset)
        return Response(started(run) | {"config": str(run.folder.name + "/" + f"{run.output_name}.toml")})


class DiffusionPipeStop(ScriptView):
    @extend_schema(request=OpenApiTypes.OBJECT, responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def post(self, request: Request) -> Response:
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
        run = newest_run(signed_in(request), query.get("run", ""), guided=False, pid=query.get("pid", ""))
        if run is None:
            return Response({"run": None, "pid": None, "lines": []})
        return Response({"run": run.pk, "pid": pid_of(run), "lines": log_lines(run, request)[0]})


# --- Other calls ------------------------------------------------------------------------------------------------------
class DatasetList(ScriptView):
    @extend_schema(responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def get(self, request: Request) -> Response:
        """The caller's datasets, named as Kohya's folders are."""
        from datasets.selectors import script_rows

        return Response(script_rows(signed_in(request)))


class ServiceList(ScriptView):
    @extend_schema(responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def get(self, request: Request) -> Response:
        """The parts of the installation, in short."""
        rows = parts.list_parts(signed_in(request))
        named = [{"name": one.name, "display": one.display, "state": one.state} for one in rows]
        return Response([row | {"running": one.is_running} for row, one in zip(named, rows, strict=True)])


class Telemetry(ScriptView):
    @extend_schema(responses=OpenApiTypes.OBJECT, tags=["scripts"])
    def get(self, request: Request) -> Response:
        """How busy this machine and the GPUs of all hosts are."""
        machine = vitals.read_machine()
        gpus = Device.objects.filter(kind="cuda").select_related("host").order_by("host__name", "index")
        return Response(
            {
                "load": list(machine.load),
                "cpu_count": machine.cpu_count,
                "memory": {"total": machine.memory_total_bytes, "used": machine.memory_used_bytes},
                "disks": disk.read_disks(),
                "gpus": [_gpu(device) for device in gpus],
            }
        )


def _gpu(device: Device) -> dict[str, Any]:
    last = device.samples.order_by("-at").first()
    return {
        "index": device.index,
        "name": device.name,
        "host": device.host.name,
        "util": last.utilisation if last else None,
        "mem_used": last.memory_used_bytes if last else None,
        "mem_total": device.memory_bytes,
    }


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
        start_pull(signed_in(request), name, self.text("subdir"), request=request._request)
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


def _manifest_row(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in MANIFEST_FIELDS}


def _pull(status: Any) -> dict[str, Any]:
    return {name: getattr(status, name) for name in PULL_FIELDS}
