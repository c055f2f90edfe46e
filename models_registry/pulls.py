"""Writes: pulling a model of the manifest from the network, as a background job or for a command.

Guarantee: a file has its name only when it is complete and its checksum was compared. A pull that was killed, cancelled
or cut off goes on where it was when it is started again; files that are there already are kept and only checked. Two
pulls of the same file at a time are refused by a lock on its beginning.
"""

from __future__ import annotations

import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from django.conf import settings
from django.db import transaction
from django.db.models import Q
from django.http import HttpRequest
from django.template.defaultfilters import filesizeformat
from django.utils import timezone

from lorapilot import jobs, workspace
from lorapilot.access import require_staff
from lorapilot.errors import Conflict, NotAllowed, UserError
from lorapilot.models import JobStatus, SecretName, User
from lorapilot.selectors import reveal_secret
from lorapilot.services import record
from models_registry import manifest
from models_registry.downloads_http import Client, Denied, Remote
from models_registry.manifest import Entry
from models_registry.manifest_selectors import target_of
from models_registry.models import Pull
from models_registry.recognition import is_pickle

STAFF_ONLY = "Only staff can pull models. Ask whoever runs this installation."
FILES_AT_ONCE = 4
PULLS_AT_ONCE = 2  # of the three workers for background jobs
LOOK_SECONDS = 0.5
SPEED_SECONDS = 10.0  # over which the speed is averaged
CIVITAI = "civitai.com"
COMMIT = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(r"[0-9a-f]{64}")

Tell = Callable[[int, int, str], None]
T = TypeVar("T")


# --- Services ---------------------------------------------------------------------------------------------------------
def start_pull(user: User | None, name: str, subdir: str = "", *, request: HttpRequest | None = None) -> Pull:
    """Begin to pull a model of the manifest in the background, into `subdir` of the models folder or where the manifest
    says.

    Raises NotAllowed (not staff), Missing (not in the manifest), UserError (folder, licence, space), Conflict (it is
    being pulled already).
    """
    require_staff(user, STAFF_ONLY)
    entry = manifest.find(name)
    _check_folder(subdir)
    refuse_without_licence(user, entry)
    _refuse_lack_of_space(entry.expected_size_bytes or 0)
    with transaction.atomic():
        Pull.objects.get_or_create(name=name)
        pull: Pull = Pull.objects.select_for_update(of=("self",)).select_related("job").get(name=name)
        if pull.is_active:
            raise Conflict(f"{name} is being pulled already.")
        pull.subdir, pull.requested_by, pull.files = subdir, user, []
        pull.job = jobs.enqueue(pull_model, label=f"Pull {name}", owner=user, pull_id=pull.pk)
        pull.save()
        record(user, "model pull started", f"{name} from {entry.source}", request)
    return pull


def cancel_pull(user: User, name: str, *, request: HttpRequest | None = None) -> Pull:
    """Stop pulling; what has arrived is kept for the next time. Raises NotAllowed, Missing, Conflict (it has ended)."""
    require_staff(user, STAFF_ONLY)
    manifest.find(name)
    pull: Pull | None = Pull.objects.select_related("job").filter(name=name).first()
    if pull is None or pull.job is None or not pull.is_active:
        raise Conflict(f"{name} is not being pulled.")
    with transaction.atomic():
        jobs.cancel(pull.job)
        record(user, "model pull cancelled", name, request)
    return pull


def pull_now(entry: Entry, subdir: str, *, user: User | None, tell: Tell) -> Pull:
    """Pull in this process, for a command. `user`: whose keys of other services are used."""
    _check_folder(subdir)
    refuse_without_licence(user, entry)
    files = perform(entry, subdir, tokens=tokens_of(user), tell=tell)
    values = {"subdir": subdir, "requested_by": user, "job": None, "files": files}
    return Pull.objects.update_or_create(name=entry.name, defaults=values)[0]


@jobs.job
def pull_model(progress: Callable[..., None], *, pull_id: int) -> dict[str, Any]:
    """The job. Started over, it goes on where it was."""
    pull = Pull.objects.select_related("requested_by", "job").filter(pk=pull_id).first()
    if pull is None:
        return {}
    entry = manifest.find(pull.name)
    _wait_for_others(pull)
    files = perform(entry, pull.subdir, tokens=tokens_of(pull.requested_by), tell=progress)
    Pull.objects.filter(pk=pull_id).update(files=files)
    return {"path": target_of(entry, pull), "files": len(files), "bytes": sum(size for _, size in files)}


def _wait_for_others(pull: Pull) -> None:
    """Those that have begun say something. Of those that only look whether they may, as this one, the older go first:
    otherwise each would wait for the others."""
    living = timezone.now() - jobs.SILENT_AFTER
    others = Pull.objects.filter(job__status=JobStatus.RUNNING, job__heartbeat_at__gt=living).exclude(pk=pull.pk)
    created_at = pull.job.created_at if pull.job else timezone.now()
    is_first = Q(job__created_at__lt=created_at) | Q(job__created_at=created_at, pk__lt=pull.pk)
    if others.filter(~Q(job__message="") | is_first).count() >= PULLS_AT_ONCE:
        raise jobs.JobPostponed(f"Waits: {PULLS_AT_ONCE} other models are being pulled.")


def _check_folder(subdir: str) -> None:
    try:
        manifest.checked_folder(subdir)
    except manifest.WrongLine as error:
        raise UserError(f"{str(error).capitalize()}.", field="subdir") from None


# --- Tokens and licences ----------------------------------------------------------------------------------------------
def tokens_of(user: User | None) -> dict[str, str]:
    """Host → the user's token for it."""
    found = {
        urlsplit(settings.HF_ENDPOINT).hostname or "": reveal_secret(user, SecretName.HUGGINGFACE),
        CIVITAI: reveal_secret(user, SecretName.CIVITAI),
    }
    return {host: token for host, token in found.items() if token}


def refuse_without_licence(user: User | None, entry: Entry) -> None:
    """Raises UserError when the model is gated and there is no token that could have accepted its licence."""
    if entry.is_gated and not reveal_secret(user, SecretName.HUGGINGFACE):
        raise UserError(_licence_sentence(entry, has_token=False))


def _licence_sentence(entry: Entry, *, has_token: bool) -> str:
    accept = f"{entry.name} is gated. Accept its licence at {entry.licence_address} with the account of your token"
    return f"{accept}, then pull it again." if has_token else f"{accept}, and set that token on your account page."


def _why_denied(entry: Entry, tokens: Mapping[str, str], denied: Denied, *, is_gated: bool) -> str:
    has_token = (urlsplit(settings.HF_ENDPOINT).hostname or "") in tokens
    if is_gated:
        return _licence_sentence(entry, has_token=has_token)
    if entry.repository:
        return f"The hub does not give out {entry.repository}: it is private or gone, or your token is no longer valid."
    if urlsplit(entry.source).hostname == CIVITAI:
        return (
            "Civitai gives this file only to people who have signed in: set your key of Civitai on your account page."
        )
    return denied.message


# --- The work ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Source:
    """What is to be pulled: files by their path below the entry's folder."""

    files: dict[str, Remote]
    is_gated: bool = False


def perform(entry: Entry, subdir: str, *, tokens: Mapping[str, str], tell: Tell) -> list[tuple[str, int]]:
    """Bring the entry's files into the models folder: [path there, bytes] of each.

    `tell(done, total, message)` hears how far it is twice a second, in bytes; what it raises ends the pull. Raises
    UserError.
    """
    client = Client(tokens)
    is_gated = entry.is_gated
    try:
        source = _ask_for_files(client, entry, tell)
        is_gated = is_gated or source.is_gated
        targets = {_place(entry, subdir, path): remote for path, remote in source.files.items()}
        _refuse_lack_of_space(sum(_missing_bytes(target, remote) for target, remote in targets.items()))
        _fetch_all(client, targets, tell)
    except Denied as denied:
        raise NotAllowed(_why_denied(entry, tokens, denied, is_gated=is_gated)) from None
    root = workspace.models().resolve()
    return [(target.relative_to(root).as_posix(), remote.size) for target, remote in targets.items()]


def _ask_for_files(client: Client, entry: Entry, tell: Tell) -> Source:
    def look(_done: int = 0) -> None:
        tell(0, entry.expected_size_bytes or 0, "Asking for the list of files")

    look()
    return _in_threads(client, [partial(_source_of, client, entry)], look)[0]


def _source_of(client: Client, entry: Entry) -> Source:
    if entry.kind == "url":
        size, is_named = client.size(entry.source), bool(entry.sha256)
        remote = Remote(entry.source.partition("#")[0], size, sha256=entry.sha256, is_of_manifest=is_named)
        return Source({entry.file_name: remote})
    answer = client.json(f"{settings.HF_ENDPOINT}/api/models/{entry.repository}?blobs=true")
    try:
        return _hub_source(entry, answer)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError("The hub's list of files cannot be read. Is HF_ENDPOINT an address of one?") from None


def _hub_source(entry: Entry, answer: Any) -> Source:
    """The hub's answer names each file with its size and checksum, all of one commit."""
    commit = answer["sha"] if COMMIT.fullmatch(answer.get("sha") or "") else "main"
    found = {file["rfilename"]: file for file in answer["siblings"]}
    if entry.kind == "hf_file":
        wanted = {entry.file_name: entry.repository_path} if entry.repository_path in found else {}
    else:
        wanted = {path: path for path in found if _is_wanted(entry, path)}
    if not wanted:
        what = entry.repository_path or f"file that matches {', '.join(entry.include) or 'anything'}"
        raise UserError(f"{entry.repository} has no {what}. The manifest is out of date.")
    files = {here: _remote(entry.repository, commit, there, found[there]) for here, there in wanted.items()}
    return Source(files, is_gated=bool(answer.get("gated")))


def _is_wanted(entry: Entry, path: str) -> bool:
    """Not the hub's own hidden files, and no pickles. Raises UserError for a wanted name that is no safe path."""
    if not entry.provides(path) or path.startswith(".") or is_pickle(path):
        return False
    if not manifest.is_safe_path(path):
        raise UserError(f"{entry.repository} has a file called {ascii(path)[:200]}, which is no safe name here.")
    return True


def _remote(repository: str, commit: str, path: str, file: Mapping[str, Any]) -> Remote:
    large = file.get("lfs") or {}
    size, sha256, blob = large.get("size", file.get("size")), large.get("sha256", ""), file.get("blobId") or ""
    if not isinstance(size, int) or size < 0 or (sha256 and not DIGEST.fullmatch(sha256)):
        raise ValueError(path)
    return Remote(
        url=f"{settings.HF_ENDPOINT}/{repository}/resolve/{commit}/{quote(path)}",
        size=size,
        sha256=sha256,
        git_sha1=blob if not sha256 and COMMIT.fullmatch(blob) else "",
    )


def _place(entry: Entry, subdir: str, path: str) -> Path:
    """Where a file goes, links followed. Raises UserError when that leaves the models folder."""
    try:
        return workspace.inside(workspace.models(), "/".join(filter(None, (subdir or entry.subdir, path))))
    except (ValueError, OSError, RuntimeError):
        raise UserError(f"{subdir or entry.subdir} is a link that leaves the models folder.") from None


def _missing_bytes(target: Path, remote: Remote) -> int:
    for path in (target, target.with_name(f"{target.name}.part")):
        if path.exists():
            return max(0, remote.size - path.stat().st_size)
    return remote.size


def _refuse_lack_of_space(needed: int) -> None:
    free = shutil.disk_usage(workspace.models()).free - settings.DISK_FLOOR_BYTES
    if needed > free:
        raise UserError(
            f"There is not enough space on the disk: {filesizeformat(needed)} are missing, and "
            f"{filesizeformat(max(0, free))} are free above the floor of {filesizeformat(settings.DISK_FLOOR_BYTES)}. "
            "Delete what is no longer needed, then pull it again."
        )


def _fetch_all(client: Client, targets: Mapping[Path, Remote], tell: Tell) -> None:
    reached = dict.fromkeys(targets, 0)
    total = sum(remote.size for remote in targets.values())
    speed = Speed()

    def look(files_done: int) -> None:
        speed.add(client.received)
        done = sum(reached.values())
        tell(done, total, _how_far(files_done, len(targets), speed, total - done))
        _refuse_lack_of_space(0)

    works = [
        partial(client.fetch, remote, target, partial(reached.__setitem__, target))
        for target, remote in targets.items()
    ]
    _in_threads(client, works, look)


def _in_threads(client: Client, works: Sequence[Callable[[], T]], look: Callable[[int], None]) -> list[T]:
    """What the works return, a few of them at a time. This thread looks twice a second, with the number of those that
    are done: a job beats there, and is cancelled there. The first exception ends all."""
    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="pull") as pool:
        tasks = [pool.submit(work) for work in works]
        try:
            while True:
                done, left = wait(tasks, timeout=LOOK_SECONDS, return_when=FIRST_EXCEPTION)
                results = [task.result() for task in tasks if task in done]
                if not left:
                    return results
                look(len(done))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            client.stop()
            raise


class Speed:
    """Bytes a second over the last ten seconds."""

    def __init__(self) -> None:
        self._seen = deque([(time.monotonic(), 0)])

    def add(self, received: int) -> None:
        now = time.monotonic()
        self._seen.append((now, received))
        while now - self._seen[0][0] > SPEED_SECONDS:
            self._seen.popleft()

    @property
    def bytes_a_second(self) -> float:
        (begin, before), (end, after) = self._seen[0], self._seen[-1]
        return (after - before) / (end - begin) if end > begin else 0.0


def _how_far(done: int, files: int, speed: Speed, left: int) -> str:
    parts = [f"{done} of {files} files"] if files > 1 else []
    if speed.bytes_a_second:
        parts += [f"{filesizeformat(speed.bytes_a_second)}/s", f"{duration(left / speed.bytes_a_second)} left"]
    return ", ".join(parts) or "Pulling"


def duration(seconds: float) -> str:
    """Roughly, as people say it: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
