"""What a run leaves behind: checkpoints, states, sample pictures, each told as an event, and TensorBoard curves."""

import time
from pathlib import Path
from typing import Any

from lora_trainer.adapter import LoraPair
from lora_trainer.architectures.base import BaseModel
from lora_trainer.atomic import write_file
from lora_trainer.config import TrainingConfig
from lora_trainer.console import Console
from lora_trainer.data import Dataset
from lora_trainer.events import EventLog
from lora_trainer.export import WrittenFile, lora_file, write_lora
from lora_trainer.loop import Loop, StepResult
from lora_trainer.lora_metadata import base_model_hashes, build_metadata
from lora_trainer.prompts import SamplePrompt
from lora_trainer.sampling import png_bytes
from lora_trainer.state import TrainingState, save_state


class Outputs:
    """Writes into the output folder, in the first process only. Paths in events are relative to it."""

    def __init__(
        self,
        config: TrainingConfig,
        *,
        dataset: Dataset,
        validation_images: int,
        processes: int,
        is_first: bool,
        model: BaseModel,
        loop: Loop,
        pairs: list[LoraPair],
        events: EventLog,
        console: Console,
    ) -> None:
        self.folder = Path(config.output_dir)
        self._config = config
        self._dataset = dataset
        self._validation_images = validation_images
        self._processes = processes
        # the whole file is read for it
        is_hash_wanted = is_first and not config.no_metadata
        self._base_hashes = base_model_hashes(Path(config.pretrained_model_name_or_path)) if is_hash_wanted else {}
        self._model = model
        self._loop = loop
        self._pairs = pairs
        self._events = events
        self._console = console
        self._started_at = time.time()
        self._curves = _open_curves(config) if is_first else None

    def checkpoint(self, *, suffix: str = "", final: bool = False) -> WrittenFile:
        """Save the LoRA as it is now, as `<name><suffix>.safetensors`."""
        with self._loop.weights_to_keep():
            tensors, metadata = lora_file(self._pairs, self._config, self._metadata())
        path = self.folder / f"{self._config.output_name}{suffix}.safetensors"
        written = write_lora(path, tensors, metadata)
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

    def checkpoint_of_step(self) -> WrittenFile:
        """Save under the step's number."""
        return self.checkpoint(suffix=f"-step{self._loop.step:08d}")

    def checkpoint_of_epoch(self) -> WrittenFile:
        """Save under the epoch's number, and forget the oldest beyond save_last_n_epochs."""
        epoch = self._loop.epoch
        written = self.checkpoint(suffix=f"-{epoch:06d}")
        kept = self._config.save_last_n_epochs
        oldest = epoch - kept * self._config.save_every_n_epochs
        if kept and oldest > 0:
            self._forget(f"-{oldest:06d}")
        return written

    def _forget(self, suffix: str) -> None:
        path = self.folder / f"{self._config.output_name}{suffix}.safetensors"
        if path.is_file():
            path.unlink()
            self._events.emit("checkpoint_removed", path=self.relative(path), step=self._loop.step)
            self._console.line(f"Removed {path}: save_last_n_epochs = {self._config.save_last_n_epochs}")

    def state(self, state: TrainingState) -> Path:
        """Save what resuming from this step needs."""
        path = save_state(self.folder / "state", state)
        self._events.emit("state", path=self.relative(path), step=state.step)
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
        self.curve("loss/current", result.loss)
        self.curve("lr/unet", result.learning_rate)
        self.curve("grad_norm", result.grad_norm)

    def curve(self, name: str, value: float) -> None:
        """Add one number of this step to the TensorBoard file, when there is one."""
        if self._curves is not None:
            self._curves.add_scalar(name, value, self._loop.step)

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
            facts=self._model.facts(),
            prediction=self._model.prediction,
            plan=self._loop.plan,
            step=self._loop.step,
            epoch=self._loop.epoch,
            started_at=self._started_at,
            processes=self._processes,
            validation_images=self._validation_images,
            base_hashes=self._base_hashes,
        )


def _open_curves(config: TrainingConfig) -> Any:
    if not config.logging_dir:
        return None
    from torch.utils.tensorboard import SummaryWriter

    make_writer: Any = SummaryWriter
    return make_writer(config.logging_dir)
