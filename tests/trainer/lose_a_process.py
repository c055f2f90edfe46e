"""Started in two processes that exchange numbers until the second ends: of a lack of memory, or killed.

Arguments: how it ends (memory, killed) and the events file.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed

from lora_trainer.command import INTERNAL_SENTENCE, _fail_beside_others, leave
from lora_trainer.console import Console
from lora_trainer.events import EventLog
from lora_trainer.failing import fail

how, path = sys.argv[1:]
is_first = os.environ["RANK"] == "0"
events = EventLog(Path(path), is_first=is_first)
torch.distributed.init_process_group("gloo")
torch.distributed.all_reduce(torch.ones(3))
events.emit("exchanged")
if not is_first and how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
try:
    if not is_first:
        torch.empty(1 << 55)
    torch.distributed.all_reduce(torch.ones(3))
except RuntimeError as error:
    # as at the end of the program, with what is still open
    status = fail(error, events, Console(), INTERNAL_SENTENCE) if is_first else _fail_beside_others(error, events)
    leave(status)
