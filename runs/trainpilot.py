"""TrainPilot's base configuration: one a user, in sd-scripts' keys, on which the profiles put their numbers."""

from __future__ import annotations

from lorapilot.models import User
from runs.models import TrainPilotBase
from runs.stacks import get_stack
from runs.stacks.base import Imported

DEFAULT = """\
# What TrainPilot's profiles build on. They set steps, rank, batch, rates and precision themselves.
# pretrained_model_name_or_path = "…"   a base model's path in the models folder, for scripts that name none

resolution = "1024,1024"
enable_bucket = true
min_bucket_reso = 768
max_bucket_reso = 1600
bucket_reso_steps = 64
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
flip_aug = true
caption_dropout_rate = 0.1

min_snr_gamma = 5.0
noise_offset = 0.02
max_grad_norm = 0.8
gradient_checkpointing = true
optimizer_type = "AdamW"
optimizer_args = ["betas=0.9,0.99", "weight_decay=0.01"]
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 2
lr_warmup_steps = 100
seed = 31337
"""


def base_text(user: User) -> str:
    """The user's base configuration as TOML; the documented one until they change it."""
    own = TrainPilotBase.objects.filter(owner=user).first()
    return own.content if own else DEFAULT


def path_of(user: User) -> str:
    """How scripts name it."""
    return f"trainpilot/{user.username}.toml"


def base_of(user: User) -> Imported:
    """The same as values. Raises UserError for one that cannot be read any more."""
    return get_stack("kohya").read_config(base_text(user))


def save_base(user: User, content: str) -> Imported:
    """Check and keep it. Raises UserError with line and column, or the key; then nothing changes."""
    read = get_stack("kohya").read_config(content)
    TrainPilotBase.objects.update_or_create(owner=user, defaults={"content": content})
    return read


def reset_base(user: User) -> None:
    """Back to the documented one."""
    TrainPilotBase.objects.filter(owner=user).delete()
