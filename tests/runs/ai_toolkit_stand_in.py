"""Stands in for AI Toolkit's run.py: the same files, database, texts and exit codes, without a model.

`recording.log` beside it is what a real run printed; what comes before its first bar is said again under the run's
name. `behaviour` beside it says how this one goes.
"""

import json
import os
import sqlite3
import struct
import sys
import time
import traceback
from pathlib import Path

import yaml

HOME = Path(__file__).parent
BEHAVIOUR = (HOME / "behaviour").read_text().strip()
CONFIG = yaml.safe_load(Path(sys.argv[1]).read_text())
NAME = CONFIG["config"]["name"]
PROCESS = CONFIG["config"]["process"][0]
FOLDER = Path(PROCESS["training_folder"]) / NAME
JOB = os.environ["AITK_JOB_ID"]
STEPS = PROCESS["train"]["steps"]
SECONDS = {"slow": 0.2}.get(BEHAVIOUR, 0.01)
STATE = {"start": 0, "saved": 0}


class Stopped(Exception):
    pass


def say(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def job(query, *values):
    with sqlite3.connect(PROCESS["sqlite_db_path"], timeout=30, isolation_level=None) as connection:
        return connection.execute(query, values).fetchone()


def tell(status, info):
    job("UPDATE Job SET status = ?, info = ? WHERE id = ?", status, info, JOB)


def maybe_stop():
    if job("SELECT stop FROM Job WHERE id = ?", JOB)[0] == 1:
        tell("stopped", "Job stopped")
        raise Stopped("Job stopped")


def write_weights(path, step):
    metadata = {"training_info": json.dumps({"step": step, "epoch": 0}), "format": "pt"}
    metadata |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in CONFIG["meta"].items()}
    header = {"__metadata__": metadata, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"\0\0\0\0")


def save(step=None, done=None):
    maybe_stop()
    tell("running", "Saving model")
    time.sleep(SECONDS)
    number = "" if step is None else f"_{step:09d}"
    path = FOLDER / f"{NAME}{number}.safetensors"
    write_weights(path, done if step is None else step)
    say(f"Saved checkpoint to {path}\n")
    if BEHAVIOUR == "is killed while it saves" and STATE["start"] == 0 and step and step > 2:
        os.kill(os.getpid(), 9)
    (FOLDER / "optimizer.pt").write_text(str(step or done))
    say(f"Saved optimizer to {FOLDER / 'optimizer.pt'}\n")
    STATE["saved"] = step or done
    maybe_stop()
    tell("running", "Training")


def draw(step):
    samples = PROCESS["sample"]["samples"]
    (FOLDER / "samples").mkdir(exist_ok=True)
    for index in range(len(samples)):
        name = f"{int(time.time() * 1000)}__{step:09d}_{index}.png"
        (FOLDER / "samples" / name).write_bytes(b"\x89PNG")
        say(f"\rGenerating Images:  50%|#####     | {index + 1}/{len(samples)} [00:00<00:00,  2.37it/s]")
    say("\r                    \r\n")


def bar(step, loss=None):
    shown = f", lr: 1.0e-04 loss: {loss:.3e}" if loss is not None else ""
    say(f"\r{NAME}: {step * 100 // STEPS:3d}%|##        | {step}/{STEPS} [00:01<00:02,  5.00it/s{shown}]")


def measure(connection, step, loss):
    values = [(step, "learning_rate", 1e-4, None), (step, "loss/loss", loss, None)]
    connection.execute("BEGIN")
    connection.execute("DELETE FROM steps WHERE step > ?", (step,))
    connection.execute("INSERT OR REPLACE INTO steps VALUES (?, ?)", (step, time.time()))
    connection.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?)", values)
    connection.execute("COMMIT")


def losses():
    connection = sqlite3.connect(FOLDER / "loss_log.db", isolation_level=None)
    connection.executescript(
        "PRAGMA journal_mode=WAL; CREATE TABLE IF NOT EXISTS steps (step INTEGER PRIMARY KEY, wall_time REAL NOT NULL);"
        "CREATE TABLE IF NOT EXISTS metrics (step INTEGER NOT NULL, key TEXT NOT NULL, value_real REAL, "
        "value_text TEXT, PRIMARY KEY (step, key));"
    )
    return connection


def resume():
    """The newest of all that begins with the name, as the real one does it."""
    found = [path for path in FOLDER.glob(f"{NAME}*") if "_cn" not in str(path)]
    if not found:
        return 0
    newest = max(found, key=os.path.getctime)
    say(f"#### IMPORTANT RESUMING FROM {newest} ####\n")
    raw = newest.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    return json.loads(header["__metadata__"]["training_info"])["step"]


def begin():
    start = STATE["start"] = STATE["saved"] = resume()
    job("UPDATE Job SET step = ? WHERE id = ?", start, JOB)
    tell("running", "Training")
    if start <= 1 and not PROCESS["train"]["disable_sampling"]:
        say("Generating baseline samples before training\n")
        draw(start)
    bar(start)


def one_step(step, connection):
    time.sleep(SECONDS)
    loss = 1 / (step + 1)
    if BEHAVIOUR == "loses its loss" and step >= 2:
        say("loss is nan\n")
        loss = 0.0
    if BEHAVIOUR == "runs out of memory" and step == 3:
        for count in (1, 2, 3):
            say(f"\n####\n# OOM during training step, skipping batch {count}/3 #\n####\n\n")
        raise RuntimeError("OOM during training step 3 times in a row, aborting training")
    bar(step, loss)
    if step != STATE["start"]:
        if step % PROCESS["save"]["save_every"] == 0:
            say(f"\nSaving at step {step}\n")
            save(step)
        if step % PROCESS["sample"]["sample_every"] == 0:
            draw(step)
        measure(connection, step, loss)
    bar(step + 1, loss)
    if BEHAVIOUR == "is killed" and step + 1 == 4 and STATE["start"] == 0:
        os.kill(os.getpid(), 9)


def look_for_requests(done):
    job("UPDATE Job SET step = ? WHERE id = ?", done, JOB)
    maybe_stop()
    if job("SELECT save_now FROM Job WHERE id = ?", JOB)[0] == 1:
        job("UPDATE Job SET save_now = '0' WHERE id = ?", JOB)
        say(f"\nSaving at step {done}\n")
        save(done)


def train(connection):
    begin()
    for step in range(STATE["start"], STEPS):
        one_step(step, connection)
        look_for_requests(step + 1)
    say("\n")
    save(done=STEPS)
    if not PROCESS["train"]["disable_sampling"]:
        draw(STEPS)


FOLDER.mkdir(parents=True, exist_ok=True)
(FOLDER / "config.yaml").write_text(yaml.safe_dump(CONFIG))
recorded = (HOME / "recording.log").read_bytes().partition(b"\rtiny_lora:")[0].decode()
say(recorded.replace("tiny_lora", NAME))
tell("running", "Loading model")
try:
    train(losses())
    tell("completed", "Training completed")
except KeyboardInterrupt:
    say("\n========================================\nJob stopped\n========================================\n")
    sys.exit(0)
except Exception as error:  # noqa: BLE001 as the real one
    say(f"Error running job: {error}\n\nResult:\n - 0 completed jobs\n - 1 failure\n")
    if not isinstance(error, Stopped):
        tell("error", str(error))
    job("UPDATE Job SET step = ? WHERE id = ?", STATE["saved"], JOB)
    traceback.print_exc()
    sys.exit(1)
