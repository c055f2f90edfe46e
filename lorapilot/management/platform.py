"""What `manage.py up` and `manage.py worker` share: one instance a workspace, the first start, the regular work."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from django.conf import settings
from django.contrib.staticfiles.finders import get_finders
from django.core.management import CommandError, call_command
from django.db import Error as DatabaseAway
from django.db import connection, connections

from lorapilot import children, database, workspace
from lorapilot.children import Child
from lorapilot.errors import UserError
from lorapilot.jobs import CLUSTER as IO_CLUSTER

log = logging.getLogger(__name__)

ANOTHER_INSTANCE = 75  # EX_TEMPFAIL
GRACE_SECONDS = 10.0  # a slice of supervision or a job may take longer; both are safe to kill
RECONCILE_SECONDS = 5.0
REGISTER_SECONDS = 60.0
LOOKOUT_SECONDS = 30.0
FIRST_LOOK_SECONDS = 5.0  # after the start: the children are up by then


def take_role(role: str) -> TextIO:
    """The lock on one role of the workspace (`web`, or a host's name), held until this process ends, however it ends.

    Raises CommandError (exit code 75) when another instance has it.
    """
    path = workspace.folder("locks") / f"{role}.lock"
    lock = path.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise CommandError(
            f"LoRA Pilot already runs in {settings.WORKSPACE} (process {holder}). Stop it first, "
            "or choose another folder with LORAPILOT_WORKSPACE.",
            returncode=ANOTHER_INSTANCE,
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def say(message: str) -> None:
    """One line for the person at the terminal."""
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def collect_static_files() -> None:
    """As collectstatic, which takes seconds, but only after a static file or a setting of theirs has changed."""
    if settings.DEBUG:
        return  # served from where they are
    stamp = Path(settings.STATIC_ROOT) / ".collected"
    state = _static_state()
    if stamp.exists() and stamp.read_text() == state:
        return
    call_command("collectstatic", interactive=False, verbosity=0)
    stamp.write_text(state)


def _static_state() -> str:
    digest = hashlib.sha256(repr(settings.STORAGES["staticfiles"]).encode())
    for finder in get_finders():
        for name, storage in finder.list([]):
            path = Path(storage.path(name))
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def wait_for_migrations() -> None:
    """Until the web host has brought the database up to date."""
    is_first_look = True
    while not _is_migrated():
        if is_first_look:
            say("Waiting until `manage.py up` on the web host (or `manage.py migrate`) has prepared the database.")
        is_first_look = False
        time.sleep(1)


def _is_migrated() -> bool:
    try:
        return not database.unapplied_migrations()
    except DatabaseAway:
        return False
    finally:
        connection.close()


def cluster(name: str, log_name: str, *, workers: int = 0, on_death: Callable[[], None] = lambda: None) -> Child:
    """A django-q2 cluster that takes the tasks addressed to `name`."""
    argv = children.python("lorapilot.cluster", name, "--workers", str(workers))
    return Child(log_name, argv, workspace.logs() / f"{log_name}.log", settings.BASE_DIR, on_death=on_death)


def web(listening: socket.socket) -> Child:
    """The web server, on a socket that stays open while the server is restarted: nobody is refused meanwhile."""
    descriptor = listening.fileno()
    argv = children.python("lorapilot.server", "--fd", str(descriptor))
    return Child("web", argv, workspace.logs() / "web.log", settings.BASE_DIR, hand_down=[descriptor])


class Housekeeper(threading.Thread):
    """Calls reconcile every 5 seconds. It outlives a database that is away, and says so once."""

    def __init__(self, *, is_host: bool) -> None:
        super().__init__(name="housekeeper", daemon=True)
        self._is_host = is_host
        self._is_release_wanted = is_host  # no slice of an earlier instance is alive: we hold the lock
        self._steady_since = self._last_round_at = self._registered_at = time.monotonic()
        self._is_over = False
        self._wake_up = threading.Event()
        self._trouble = ""

    def cluster_died(self) -> None:
        """Its slices died with it: let others take over their runs at once."""
        self._is_release_wanted = True
        self._wake_up.set()

    def end(self) -> None:
        self._is_over = True
        self._wake_up.set()
        self.join(timeout=5)

    def run(self) -> None:
        while not self._is_over:
            self._wake_up.clear()
            self._round()
            self._wake_up.wait(RECONCILE_SECONDS)

    def _round(self) -> None:
        from runs.reconcile import reconcile, release_leases

        try:
            if self._is_release_wanted:
                release_leases(settings.HOST_NAME)
                self._is_release_wanted = False
            reconcile(is_host=self._is_host, watched_seconds=self._watched_seconds())
            self._register_again()
        except DatabaseAway as error:
            self._tell(f"The database does not answer: {str(error).strip().splitlines()[0]}")
        except Exception as error:
            if self._tell(f"Housekeeping failed: {error!r}"):
                log.exception("housekeeping failed")
        else:
            self._tell("")
        finally:
            connections.close_all()

    def _watched_seconds(self) -> float:
        """For how long the rounds have come without a gap."""
        now = time.monotonic()
        if self._trouble or now - self._last_round_at > 2 * RECONCILE_SECONDS:
            self._steady_since = now
        self._last_round_at = now
        return now - self._steady_since

    def _register_again(self) -> None:
        """Devices come and go; and a slot that trained until now may have to be arranged anew."""
        from runs.hosts import register_host

        if self._is_host and time.monotonic() - self._registered_at > REGISTER_SECONDS:
            self._registered_at = time.monotonic()
            register_host()

    def _tell(self, trouble: str) -> bool:
        """Say what is wrong, or that nothing is any more; once. Returns whether that is news."""
        is_news = trouble != self._trouble
        if is_news:
            say(trouble or "Housekeeping works again.")
        self._trouble = trouble
        return is_news


class Lookout(threading.Thread):
    """Every half minute stores how busy this host's devices are, which of its processes run, and what its trainers are.

    A thread of its own: a trainer's Python takes seconds to answer, and the housekeeper must not wait for it. Nothing
    rests on it, so it needs no end of its own, and only the housekeeper tells of a database that is away.
    """

    def __init__(self) -> None:
        super().__init__(name="lookout", daemon=True)
        self._trouble = ""

    def run(self) -> None:
        time.sleep(FIRST_LOOK_SECONDS)
        while True:
            self._look()
            time.sleep(LOOKOUT_SECONDS)

    def _look(self) -> None:
        from runs.lookout import look_around

        try:
            look_around(children.running_children(os.getpid()))
        except DatabaseAway:
            log.debug("the lookout found no database", exc_info=True)
        except Exception as error:
            if repr(error) != self._trouble:
                log.exception("the lookout failed")
            self._trouble = repr(error)
        else:
            self._trouble = ""
        finally:
            connections.close_all()


def keep_house(*, is_host: bool) -> Housekeeper:
    housekeeper = Housekeeper(is_host=is_host)
    housekeeper.start()
    return housekeeper


def start_training_side() -> tuple[Housekeeper, list[Child]]:
    """This machine as a host: known to the database, with its clusters (not started yet) and its regular work.

    Raises CommandError when it cannot be one.
    """
    from runs.hosts import register_host

    try:
        host = register_host()
    except UserError as error:
        raise CommandError(error.message) from None
    workers = max(settings.Q_CLUSTER["workers"], host.slots.count() + 2)  # each slot's run needs one almost always
    housekeeper = keep_house(is_host=True)
    Lookout().start()
    return housekeeper, [
        cluster(settings.HOST_NAME, "worker", workers=workers, on_death=housekeeper.cluster_died),
        cluster(IO_CLUSTER, "io"),
    ]
