"""A stand-in for Diffusion Pipe and DeepSpeed's launcher: two small programs that print, write and exit as they do.

`install(home)` puts them where the compiled command line finds them: `-m deepspeed.launcher.launch` and train.py in the
current folder. How it ends is in `home/behaviour`. Written after train.py and utils/saver.py of 8f83dbf2 and
deepspeed/launcher/launch.py of 0.18.4.
"""

import textwrap

LAUNCH = textwrap.dedent(
    """
    import base64, json, os, signal, subprocess, sys, time
    def log(text, line=1, where="main"):
        print(f"[2026-08-20 10:00:00,000] [INFO] [launch.py:{line}:{where}] {text}", flush=True)
    world, address, port, *command = sys.argv[1:]
    devices = json.loads(base64.urlsafe_b64decode(world.removeprefix("--world_info=")))["localhost"]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    os.environ["MASTER_PORT"] = port.removeprefix("--master_port=")
    log(f"Setting CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}", 184)
    worker = subprocess.Popen([sys.executable, "-u", command[0], "--local_rank=0", *command[1:]])
    def end(number, frame):
        log(f"Killing subprocess {worker.pid}", 319, "sigkill_handler")
        worker.terminate()
        worker.wait()
        log("Main process received SIGTERM, exiting", 329, "sigkill_handler")
        sys.exit(1)
    signal.signal(signal.SIGTERM, end)
    while worker.poll() is None:
        if os.path.exists("is unwatched"):
            os._exit(0)  # as the outer launcher, when the inner one is killed
        time.sleep(0.05)
    if worker.returncode:
        log(f"exits with return code = {worker.returncode}", 325, "sigkill_handler")
        sys.exit(worker.returncode)
    log(f"Process {worker.pid} exits successfully.", 367)
    """
)

TRAIN = textwrap.dedent(
    """
    import argparse, hashlib, json, os, pathlib, shutil, signal, struct, sys, time, tomllib
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--config", type=pathlib.Path)
    parser.add_argument("--master_port", type=int)
    parser.add_argument("--resume_from_checkpoint")
    args = parser.parse_args()
    config = tomllib.loads(args.config.read_text())
    data = tomllib.loads(pathlib.Path(config["dataset"]).read_text())
    behaviour = open("behaviour").read()
    monitoring = config.get("monitoring", {})
    if monitoring.get("enable_wandb"):
        key = monitoring["wandb_api_key"] or os.environ["WANDB_API_KEY"]
        names = (monitoring["wandb_tracker_name"], monitoring["wandb_run_name"])
        print("wandb:", *names, hashlib.sha256(key.encode()).hexdigest())
    for directory in data["directory"]:
        print(f"caching latents: {directory['path']}")
    if behaviour == "waits before it trains":
        time.sleep(30)
    run = pathlib.Path(config["output_dir"]) / (args.resume_from_checkpoint or f"20260820_{time.time_ns()}")
    run.mkdir(parents=True, exist_ok=True)
    print("Global batch size = 1")
    step = 0
    if args.resume_from_checkpoint:
        tag = (run / "latest").read_text()
        step = json.loads((run / tag / "mp_rank_00_model_states.pt").read_text())
        print(f"Resuming training from checkpoint. Resuming at epoch: 1, step: {step + 1}")
    def save_state():
        tag = f"global_step{step}"
        (run / tag).mkdir(exist_ok=True)
        log = "[2026-08-20 10:00:00,000] [INFO] [logging.py:128:log_dist] [Rank 0]"
        print(f"{log} Saving model checkpoint: {run / tag}/mp_rank_00_model_states.pt")
        (run / tag / "mp_rank_00_model_states.pt").write_text(json.dumps(step))
        (run / "latest").write_text(tag)
    def save_model(name):
        print(f"Saving model to directory {name}")
        (run / name / "tmp").mkdir(parents=True)
        if behaviour == "is killed while it saves":
            os.kill(os.getpid(), signal.SIGKILL)
        header = json.dumps({"lora": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                             "__metadata__": {"format": "pt"}}).encode()
        (run / name / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"abcd")
        shutil.copy(args.config, run / name)
        shutil.rmtree(run / name / "tmp")
    while True:
        step += 1
        loss = float("nan") if behaviour == "learns nothing" and step > 2 else 1 / step
        print(f"steps: {step} loss: {loss:0.4f} iter time (s): 0.500 samples/sec: 2.000")
        if behaviour == "learns nothing" and step > 2:
            time.sleep(30)
        saved = checkpointed = False
        until = time.time() + 30
        while behaviour == "waits for a stop" and not (run / "save_quit").exists() and time.time() < until:
            time.sleep(0.05)
        quits = (run / "save_quit").exists()
        if step % config["save_every_n_steps"] == 0:
            save_model(f"step{step}")
            saved = True
        if quits or step == 2:
            (run / "save_quit").unlink(missing_ok=True)
            save_state()
            checkpointed = True
        if step == 3 and behaviour == "runs out of memory":
            raise RuntimeError("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
        if step == 3 and behaviour == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 3 and behaviour == "loses its launcher":
            open("is unwatched", "w").close()
            time.sleep(30)
        if quits:
            print("Manually quitting")
            sys.exit()
        if step >= config["max_steps"]:
            break
    if not checkpointed:
        save_state()
    if not saved:
        save_model(f"step{step}")
    print("TRAINING COMPLETE!")
    """
)


def install(home, behaviour="finishes"):
    package = home / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "launch.py").write_text(LAUNCH)
    (home / "train.py").write_text(TRAIN)
    behave(home, behaviour)


def behave(home, behaviour):
    (home / "behaviour").write_text(behaviour)
    (home / "is unwatched").unlink(missing_ok=True)
