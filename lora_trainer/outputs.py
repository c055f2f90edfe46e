"""What a run leaves behind: checkpoints, states, sample pictures, each told as an event, and TensorBoard curves."""

import time
from pathlib import Path
from typing import Any

from lora_trainer.adapter import LoraPair
from lora_trainer.atomic import write_file
from lora_trainer.config import SamplePrompt, TrainingConfig
from lora_trainer.console import Console
from lora_trainer.data import Dataset
from lora_trainer.events import EventLog
from lora_trainer.export import WrittenFile, kohya_tensors, write_lora
from lora_trainer.loop import Loop, StepResult
from lora_trainer.lora_metadata import build_metadata
from lora_trainer.sampling import png_bytes
from lora_trainer.state import save_state


class Outputs:
    """Writes into the output folder. Paths in events are relative to it."""

    def __init__(
        self,
        config: TrainingConfig,
        *,
        dataset: Dataset,
        loop: Loop,
        pairs: list[LoraPair],
        unet_config: Any,
        prediction: str,
        batches_per_epoch: int,
        events: EventLog,
        console: Console,
    ) -> None:
        self.folder = Path(config.output_dir)
        self._config = config
        self._dataset = dataset
        self._loop = loop
        self._pairs = pairs
        self._unet_config = unet_config
        self._prediction = prediction
        self._batches_per_epoch = batches_per_epoch
        self._events = events
        self._console = console
        self._started_at = time.time()
        self._curves = _open_curves(config)

    def checkpoint(self, *, final: bool) -> WrittenFile:
        """Save the LoRA as it is now, as `<name>.safetensors` or with the step in its name."""
        suffix = "" if final else f"-step{self._loop.step:08d}"
        tensors = kohya_tensors(self._pairs, self._unet_config, self._config.save_precision)
        written = write_lora(self.folder / f"{self._config.output_name}{suffix}.safetensors", tensors, self._metadata())
        self._events.emit(
            "checkpoint",
            path=self.relative(written.path),
            step=self._loop.step,
            bytes=written.size_bytes,
            sha256=written.sha256,
            final=final,
        )
        self._console.line(f"Saved {written.path} ({written.size_bytes / 1e6:.1f} MB)")
        return written

    def state(self) -> Path:
        """Save what resuming from this step needs."""
        path = save_state(self.folder / "state", self._loop.state())
        self._events.emit("state", path=self.relative(path), step=self._loop.step)
        return path

    def sample(self, index: int, sample: SamplePrompt, image: Any) -> None:
        """Save one sample picture."""
        path = self.folder / "samples" / f"{self._config.output_name}_{self._loop.step:08d}_{index:02d}.png"
        write_file(path, png_bytes(image))
        self._events.emit(
            "sample",
            path=self.relative(path),
            step=self._loop.step,
            index=index,
            prompt=sample.prompt,
            negative_prompt=sample.negative_prompt,
            seed=sample.seed,
            width=sample.width,
            height=sample.height,
        )

    def curves(self, result: StepResult) -> None:
        """Add the step to the TensorBoard file, when there is one."""
        if self._curves is None:
            return
        step = self._loop.step
        self._curves.add_scalar("loss/current", result.loss, step)
        self._curves.add_scalar("lr/unet", result.learning_rate, step)
        self._curves.add_scalar("grad_norm", result.grad_norm, step)

    def close(self) -> None:
        """Flush the TensorBoard file."""
        if self._curves is not None:
            self._curves.close()

    def relative(self, path: Path) -> str:
        """A path as events name it."""
        return path.relative_to(self.folder).as_posix()

    def _metadata(self) -> dict[str, str]:
        return build_metadata(
            self._config,
            self._dataset,
            step=self._loop.step,
            epoch=self._loop.epoch,
            started_at=self._started_at,
            prediction=self._prediction,
            batches=self._batches_per_epoch,
        )


def _open_curves(config: TrainingConfig) -> Any:
    if not config.logging_dir:
        return None
    from torch.utils.tensorboard import SummaryWriter

    make_writer: Any = SummaryWriter
    return make_writer(config.logging_dir)
