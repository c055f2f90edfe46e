"""Stands in for sd-scripts' train_network.py (v0.10.1, 48d368fa) in tests: reads its TOML, prints what it prints,
writes the files that it writes, in its order, and dies by signals as it does. It trains nothing.

The file `behaviour` beside it says how it goes on: finishes, slow, nan, oom, empty, breaks.
"""

import json
import struct
import sys
import time
import tomllib
from pathlib import Path

behaviour = Path(__file__).with_name("behaviour").read_text().strip()
config = tomllib.loads(Path(sys.argv[sys.argv.index("--config_file") + 1]).read_text())
name, output = config["output_name"], Path(config["output_dir"])
total, every = config["max_train_steps"], config["save_every_n_steps"]


def say(text):
    print(text, file=sys.stderr, flush=True)


def save_weights(file, steps):
    say(f"\nsaving checkpoint: {output / file}")
    header = {"__metadata__": {"ss_steps": str(steps)}, "lora": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    output.mkdir(parents=True, exist_ok=True)
    (output / file).write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)


def save_state(folder, steps):
    path = output / folder
    path.mkdir(parents=True)
    (path / "train_state.json").write_text(json.dumps({"current_epoch": 1, "current_step": steps}))
    for file in ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (path / file).write_bytes(b"state")
    say(f"Random states saved in {path}/random_states_0.pkl")


def bar(step, loss):
    share = f"{100 * step // total:3d}%|{'#' * step}{' ' * (total - step)}| {step}/{total} [00:01<00:02,  2.00it/s"
    sys.stderr.write(f"\rsteps: {share}]\rsteps: {share}, avr_loss={loss}]")
    sys.stderr.flush()


def sample(steps):
    say("")
    say(f"generating sample images at step / サンプル画像生成 ステップ: {steps}")
    folder = output / "sample"
    folder.mkdir(parents=True, exist_ok=True)
    for index, prompt in enumerate(json.loads(Path(config["sample_prompts"]).read_text())):
        say(f"prompt: {prompt['prompt']}")
        count = f"{steps:06d}" if steps else "e000000"
        file = f"{name}_{count}_{index:02d}_20261127000000_{prompt['seed']}.png"
        (folder / file).write_bytes(b"\x89PNG")


say("loading model for process 0/1")
if behaviour == "empty":
    say("No data found. Please verify arguments (train_data_dir must be the parent of folders with images)")
    sys.exit(0)
if behaviour == "breaks":
    for number in range(40):
        say(f"line {number} of a traceback nobody knows")
    sys.exit(1)
if "resume" in config:
    assert (Path(config["resume"]) / "random_states_0.pkl").is_file()
    say(f"Loading states from {config['resume']}")
say("running training / 学習開始")
if config.get("sample_at_first"):
    sample(0)
sys.stderr.write(f"\rsteps:   0%|          | 0/{total} [00:00<?, ?it/s]")
print("\nepoch 1/1\n", flush=True)
for step in range(1, total + 1):
    time.sleep({"slow": 0.15}.get(behaviour, 0.0))
    if behaviour == "oom" and step == 3:
        say("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
        sys.exit(1)
    bar(step, "nan" if behaviour == "nan" and step >= 2 else 1 / step)
    if behaviour == "nan" and step == 3:
        time.sleep(30)
    if config.get("sample_prompts") and step % config["sample_every_n_steps"] == 0:
        sample(step)
    if step % every == 0:
        save_weights(f"{name}-step{step:08d}.safetensors", step)
        say(f"\nsaving state at step {step}")
        save_state(f"{name}-step{step:08d}-state", step)
        bar(step, 1 / step)
say("\nsaving last state.")
save_state(f"{name}-state", total)
save_weights(f"{name}.safetensors", total)
say("model saved.")
bar(total, 1 / total)
