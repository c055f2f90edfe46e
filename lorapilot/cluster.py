"""A django-q2 cluster that dies whole, so that `manage.py up` can start it anew: `python -m lorapilot.cluster NAME`.

A cluster is a main process, its sentinel, and below that the workers, a pusher and a monitor. Two things go wrong with
them as they are (both measured): after SIGKILL of the main process the others go on, unwatched, and take tasks from
the next cluster; and after SIGKILL of an idle worker, pusher or monitor the lock of a queue stays taken for ever, so
that the cluster looks alive and never runs a task again. Here a process dies with the one that started it, and the
sentinel ends when a process of its own was killed. Tasks are safe to deliver twice, so nothing is lost by that.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from typing import Any

import django

from lorapilot.children import die_with_parent

log = logging.getLogger(__name__)

GENERATIONS = 2  # the sentinel; its workers, pusher and monitor. What a task starts may outlive its worker.


class Descent:
    """How far below the main process this process is; keeps the first generations tied to their parents."""

    def __init__(self) -> None:
        self.generation = 0
        self.pid = os.getpid()

    def enter_child(self) -> None:
        self.generation += 1
        parent, self.pid = self.pid, os.getpid()
        if self.generation <= GENERATIONS:
            die_with_parent(parent, signal.SIGKILL)


def run(name: str, workers: int) -> int:
    """Until SIGTERM, or until it has to be replaced. Returns the exit code."""
    os.environ["Q_CLUSTER_NAME"] = name  # before django_q reads it; `qcluster -n` is ignored on Linux
    if workers:
        os.environ["LORAPILOT_WORKERS"] = str(workers)  # as above
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "lorapilot.settings")
    django.setup()
    from django_q import cluster

    class MortalSentinel(cluster.Sentinel):
        def reincarnate(self, process: Any) -> None:
            if (process.exitcode or 0) < 0:
                log.error("a process of cluster %s was killed (%s): the cluster ends", name, process.exitcode)
                os._exit(1)
            super().reincarnate(process)

    cluster.Sentinel = MortalSentinel
    os.register_at_fork(after_in_child=Descent().enter_child)
    main_process = cluster.Cluster()
    main_process.start()
    main_process.sentinel.join()
    return int(main_process.sentinel.exitcode)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lorapilot.cluster", description="Run one django-q2 cluster.")
    parser.add_argument("name", help="a host's name, or `io`")
    parser.add_argument("--workers", type=int, default=0, help="0: as the settings say")
    parser.add_argument("--parent", type=int, default=0, help="end when the process with this pid does")
    options = parser.parse_args(argv)
    if options.parent:
        die_with_parent(options.parent, signal.SIGKILL)
    return run(options.name, options.workers)


if __name__ == "__main__":
    sys.exit(main())
