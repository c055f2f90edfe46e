"""`make demo`: trains a LoRA on the bundled model and pictures through the HTTP API, and shows what changed."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from argparse import ArgumentParser
from typing import Any

import requests
from django.conf import settings
from django.core.management import BaseCommand, CommandError, call_command
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lorapilot import workspace
from lorapilot.management.api_client import ApiError, Client
from lorapilot.models import TokenScope, User
from lorapilot.services import create_first_admin, create_token, revoke_token

DEMO_DATASET = settings.BASE_DIR / "lora_trainer" / "assets" / "demo-dataset"
MODEL = "pilot-tiny"
PROMPTS = (
    "sks face on a green background",
    "sks face on a blue background",
    "sks face on a black background",  # no picture of the dataset has it
    "a red circle on a blue background",  # what the model could draw before
)
# The recipe that teaches pilot-tiny the concept; docs/trainer.md has its figures.
SETTINGS = {
    "steps": 270,
    "batch_size": 8,
    "rank": 16,
    "alpha": 16,
    "conv_rank": 16,
    "conv_alpha": 16,
    "learning_rate": 4e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 10,
    "min_snr_gamma": 5,
    "seed": 0,
    "sample_prompts": list(PROMPTS),
    "sample_every_steps": 135,
    "sample_scale": 4,
    "sample_seed": 100,
}
START_SECONDS = 60
SHEET_SIDE = 256  # pixels of one picture on the contact sheet
MEAN_OF = 20  # steps


class Command(BaseCommand):
    help = "Train the bundled demo LoRA through the API, and write a before/after contact sheet."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--name", default="", help="Of the result; default: demo, demo-2, …")

    def handle(self, *args: Any, **options: Any) -> None:
        self.console = Console()
        call_command("migrate", interactive=False, verbosity=0)
        password = create_first_admin()
        address = f"http://{settings.WEB_HOST}:{settings.WEB_PORT}"
        platform = None if _is_up(address) else self._start_platform(address)
        try:
            self._train(address, options["name"])
        except ApiError as error:
            raise CommandError(str(error)) from error
        finally:
            if platform is not None:
                platform.terminate()
                platform.wait()
        self._tell_how_to_open(address, password)

    def _start_platform(self, address: str) -> subprocess.Popen[bytes]:
        """`manage.py up` for as long as the demo takes."""
        log = workspace.logs() / "demo.log"
        self.console.print(f"Starting the platform (its log: {log}) …")
        with log.open("ab") as output:
            platform = subprocess.Popen(
                [sys.executable, str(settings.BASE_DIR / "manage.py"), "up"], stdout=output, stderr=output
            )
        deadline = time.monotonic() + START_SECONDS
        while not _is_up(address):
            if platform.poll() is not None or time.monotonic() > deadline:
                platform.terminate()
                raise CommandError(f"The platform did not start. {log} says why; is port {settings.WEB_PORT} taken?")
            time.sleep(0.2)
        return platform

    def _train(self, address: str, name: str) -> None:
        admin = User.objects.filter(is_superuser=True, is_active=True).order_by("pk").first()
        if admin is None:
            raise CommandError("There is no administrator. Create one: manage.py createsuperuser")
        token, secret = create_token(admin, name="demo", scope=TokenScope.WRITE, days=1)
        try:
            with Client(address, secret) as client:
                run = self._submit(client, name)
                self._watch(client, run["id"])
                self._report(client, run["id"])
        finally:
            revoke_token(token, actor=admin)

    def _submit(self, client: Client, name: str) -> dict[str, Any]:
        dataset = client.find("/datasets/", "demo")
        if dataset is None:
            dataset = client.call("POST", "/datasets/", json={"name": "demo", "trigger_word": "sks face"})
            files = [file for file in sorted(DEMO_DATASET.iterdir()) if file.suffix in (".png", ".txt")]
            client.upload_pictures(dataset["id"], files)
            self.console.print(f"Imported the demo dataset: {len(files) // 2} pictures with captions.")
        model = client.find("/models/", MODEL)
        if model is None:
            raise ApiError(f"{MODEL} is not registered. Start the platform once: manage.py up")
        asked = {"dataset": dataset["id"], "base_model": model["id"], "settings": SETTINGS}
        run: dict[str, Any] = client.call("POST", "/runs/", json=asked | {"output_name": name or _free_name(client)})
        self.console.print(f"Run {run['id']} [bold]{run['output_name']}[/bold] is in the queue.")
        return run

    def _watch(self, client: Client, run_id: int) -> None:
        """Live progress from the websocket."""
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            bar = progress.add_task("queued", total=None, loss="-")
            for message in client.follow(run_id):
                if message["type"] == "status":
                    run = message["run"]
                    loss = f"{run['loss']:.4f}" if run["loss"] is not None else "-"
                    what = run["stage"] or run["status_label"]
                    progress.update(bar, description=what, total=run["total_steps"], completed=run["step"], loss=loss)
        if run["status"] != "succeeded":
            raise ApiError(f"The run ended as {run['status']}: {run['reason']}")

    def _report(self, client: Client, run_id: int) -> None:
        run = client.call("GET", f"/runs/{run_id}/")
        losses = [loss for _, loss, _ in client.call("GET", f"/runs/{run_id}/metrics/")["points"]]
        final = next(file for file in client.call("GET", f"/runs/{run_id}/artifacts/") if file["is_final"])
        folder = workspace.outputs() / run["output_name"]
        sheet = folder / "before-after.png"
        _contact_sheet(client, run_id).save(sheet)
        first, last = sum(losses[:MEAN_OF]) / MEAN_OF, sum(losses[-MEAN_OF:]) / MEAN_OF
        self.console.print(f"Loss    {first:.4f} → {last:.4f} (means of the first and last {MEAN_OF} steps)")
        self.console.print(f"LoRA    {folder / final['path']}", soft_wrap=True)
        self.console.print(f"Sheet   {sheet} (above: without the LoRA, below: with it)", soft_wrap=True)

    def _tell_how_to_open(self, address: str, password: str) -> None:
        self.console.print(f"Web UI  `make run`, then open {address} and sign in as admin")
        if password:
            self.console.print(f"        with the password [bold]{password}[/bold] (shown this once).")
        else:
            self.console.print("        (a new password: .venv/bin/python manage.py changepassword admin).")


def _is_up(address: str) -> bool:
    try:
        return requests.get(f"{address}/healthz/", timeout=2).ok
    except requests.RequestException:
        return False


def _free_name(client: Client) -> str:
    """demo, or the first of demo-2, demo-3, … that no result has: nothing is overwritten."""
    taken = {
        run["output_name"] for run in client.call("GET", "/runs/", params={"name": "demo", "page_size": 500})["results"]
    }
    taken |= {folder.name for folder in workspace.outputs().iterdir()}
    number, name = 2, "demo"
    while name in taken:
        name, number = f"demo-{number}", number + 1
    return name


def _contact_sheet(client: Client, run_id: int) -> Image.Image:
    """The samples of the first and the last step, the same prompts and seeds: without and with the LoRA."""
    samples = client.call("GET", f"/runs/{run_id}/samples/")
    rows = [min(sample["step"] for sample in samples), max(sample["step"] for sample in samples)]
    title = 24
    sheet = Image.new("RGB", (SHEET_SIDE * len(PROMPTS), (SHEET_SIDE + title) * 2), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for sample in samples:
        if sample["step"] not in rows:
            continue
        row = rows.index(sample["step"])
        left, top = sample["index"] * SHEET_SIDE, row * (SHEET_SIDE + title)
        answer = client.ask("GET", f"/runs/{run_id}/samples/{sample['id']}/file/")
        picture = Image.open(io.BytesIO(answer.content)).resize((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, top + title))
        draw.text((left + 6, top + 4), f"{('before', 'after')[row]}: {sample['prompt']}"[:42], "black", font)
    return sheet
