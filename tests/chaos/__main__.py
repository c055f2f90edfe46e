"""`make chaos`: everything that can go wrong goes wrong while the real trainer trains, and then everything is compared.

    python -m tests.chaos [--seed 1] [--rounds 1] [--on sqlite postgres] [--fault NAME …] [--report FILE]

Ends with 1 when an invariant broke, and names the fault, the seed and the folder that holds the evidence.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.chaos.faults import FAULTS, Fault, RedisServer, Scene, set_clock
from tests.chaos.installation import Installation, Witness, mounted
from tests.chaos.invariants import broken, seconds_to_truth, wait_for_end, weights_of
from tests.chaos.proxy import Proxy
from tests.services import POSTGRES, postgres_url

SMALL_DISK_MIB = 256
CLOCK_SOURCE = Path(__file__).with_name("clock.c")


@dataclass
class Result:
    """Of one fault, once."""

    database: str
    fault: str
    seed: int
    moment: str
    truthful_after_seconds: float
    attempts: int
    broken: list[str]
    evidence: str = ""


@dataclass
class Surroundings:
    """Where runs take place: an installation, with what can be taken away from it."""

    name: str
    installation: Installation
    has: set[str]
    reference: dict
    database: Proxy | None = None
    redis: RedisServer | None = None


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def surroundings(database: str, folder: Path, *, kind: str = "") -> Iterator[Surroundings]:
    """`kind`: `fleet` (two workers), `small disk`, `clock` (a clock that can be set), or nothing special."""
    with ExitStack() as stack:
        environment, has = {}, {kind} - {""}
        proxy = redis = None
        if database == "postgres":
            url = stack.enter_context(postgres_url(f"lorapilot_chaos_{uuid.uuid4().hex[:8]}"))
            server = urlsplit(POSTGRES)
            proxy = Proxy((server.hostname or "127.0.0.1", server.port or 5432))
            stack.callback(proxy.cut)
            environment["DATABASE_URL"] = url.replace(f":{server.port or 5432}/", f":{proxy.port}/")
            if shutil.which("redis-server"):
                redis = RedisServer(folder / "redis", free_port())
                stack.callback(redis.stop)
                environment["REDIS_URL"] = f"redis://127.0.0.1:{redis.port}/0"
                has.add("redis")
        if kind == "small disk":
            stack.enter_context(mounted(folder / "ws" / "outputs", SMALL_DISK_MIB))
            environment["DISK_FLOOR_GIB"] = "0"
        if kind == "clock":
            folder.mkdir(parents=True, exist_ok=True)
            library = folder / "clock.so"
            subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(CLOCK_SOURCE), "-ldl"], check=True)
            set_clock(folder / "clock", 0)
            environment |= {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(folder / "clock")}
        installation = Installation(folder, environment, hosts=("ada", "bob") if kind == "fleet" else ())
        stack.callback(installation.stop)
        installation.start()
        yield Surroundings(database, installation, has, _reference(installation), proxy, redis)


def _reference(installation: Installation) -> dict:
    """What an uninterrupted run of the same seed measures and makes."""
    run = installation.submit("reference")
    scene = Scene(installation, run, "reference", random.Random(0))
    ended = wait_for_end(scene)
    if ended["status"] != "succeeded":
        raise RuntimeError(f"the uninterrupted run ended as {ended['status']}: {ended['reason']}")
    weights = weights_of(scene.folder / "reference.safetensors")[1]
    return {"points": installation.facts(run)["points"], "weights": weights}


def try_fault(around: Surroundings, fault: Fault, seed: int) -> Result:
    """One run under one fault, from submission to the comparison."""
    name = f"{fault.name.replace(' ', '-')}-{seed}"
    run = around.installation.submit(name)
    rng = random.Random(f"{seed} {name} {around.name}")
    scene = Scene(around.installation, run, name, rng, around.database, around.redis)
    witness = Witness(around.installation, run)
    witness.start()
    fault.strike(scene)
    truthful = seconds_to_truth(scene, time.monotonic())
    ended = wait_for_end(scene)
    wrong = [] if ended["status"] == "succeeded" else [f"it ended as {ended['status']}: {ended['reason']}"]
    if not wrong:
        wrong = broken(scene, witness, around.reference)
    witness.is_over = True
    evidence = str(around.installation.folder) if wrong else ""
    return Result(around.name, fault.name, seed, scene.moment, truthful, ended.get("attempt", 0), wrong, evidence)


def kinds_of(faults: list[Fault]) -> dict[str, list[Fault]]:
    """Faults by the kind of installation that they need."""
    found: dict[str, list[Fault]] = {}
    for fault in faults:
        kind = next(iter(fault.needs - {"redis"}), "")
        found.setdefault(kind, []).append(fault)
    return found


def why_not(kind: str, database: str) -> str:
    """Why a kind of installation cannot be had here; empty when it can."""
    if kind == "fleet" and database == "sqlite":
        return "several hosts need PostgreSQL"
    if kind == "clock" and not shutil.which("cc"):
        return "a C compiler makes the clock that can be set (apt install gcc libc6-dev)"
    if kind == "small disk":
        with tempfile.TemporaryDirectory() as folder:
            try:
                with mounted(Path(folder) / "try", 1):
                    return ""
            except OSError as error:
                return f"no file system can be mounted: {error}"
    return ""


def run_all(options: argparse.Namespace, base: Path) -> list[Result]:
    wanted = [fault for fault in FAULTS if not options.fault or fault.name in options.fault]
    results: list[Result] = []
    for database in options.on:
        for kind, faults in kinds_of(wanted).items():
            if reason := why_not(kind, database):
                print(f"skipped on {database}: {', '.join(fault.name for fault in faults)} ({reason})", flush=True)
                continue
            folder = base / f"{database}-{kind.replace(' ', '-') or 'plain'}"
            with surroundings(database, folder, kind=kind) as around:
                for number in range(options.rounds):
                    possible = [fault for fault in faults if fault.needs <= around.has]
                    results += [_tell(try_fault(around, fault, options.seed + number)) for fault in possible]
    return results


def _tell(result: Result) -> Result:
    verdict = "ok" if not result.broken else "BROKEN: " + "; ".join(result.broken)
    print(
        f"{result.database:9} {result.fault:28} {result.moment or '-':9} truthful after "
        f"{result.truthful_after_seconds:5.1f} s, {result.attempts} attempts, {verdict}",
        flush=True,
    )
    return result


def summary(results: list[Result]) -> str:
    seconds = [result.truthful_after_seconds for result in results] or [0.0]
    survived = sum(not result.broken for result in results)
    return (
        f"{len(results)} faults tried, {survived} survived; seconds to a truthful state: "
        f"median {statistics.median(seconds):.1f}, worst {max(seconds):.1f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--on", nargs="+", choices=("sqlite", "postgres"), default=["sqlite", "postgres"])
    parser.add_argument("--fault", nargs="+", choices=[fault.name for fault in FAULTS])
    parser.add_argument("--report", type=Path, help="results as JSON")
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="lorapilot-chaos-"))
    results = run_all(options, base)
    print(summary(results))
    if options.report:
        options.report.write_text(json.dumps([asdict(result) for result in results], indent=2))
    if any(result.broken for result in results):
        print(f"evidence is kept in {base}; again with --seed {options.seed}")
        return 1
    shutil.rmtree(base, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
