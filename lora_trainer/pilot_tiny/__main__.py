"""Start one of the steps: `python -m lora_trainer.pilot_tiny draw|build|train|evaluate …` from the repository."""

import argparse
import sys
from pathlib import Path

from lora_trainer.__main__ import hide_neighbours, stay_offline, stay_quiet


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    from lora_trainer.pilot_tiny import commands

    command = {
        "draw": commands.draw,
        "build": commands.build,
        "train": commands.train,
        "evaluate": commands.evaluate,
    }[options.command]
    command(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_trainer.pilot_tiny", description=__doc__)
    steps = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=0, help="same seed, same result (default: %(default)s)")
    common.add_argument("--threads", type=int, default=1, help="results may depend on it (default: %(default)s)")
    _add_draw(steps.add_parser("draw", parents=[common], help="write pictures with captions, as training sees them"))
    _add_build(steps.add_parser("build", parents=[common], help="write the untrained model"))
    _add_train(
        steps.add_parser("train", parents=[common], help="train one part of a model; resumes when started again")
    )
    _add_evaluate(steps.add_parser("evaluate", parents=[common], help="let a model draw, and count what is right"))
    return parser


def _add_draw(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--count", type=int, default=24, help="how many (default: %(default)s)")


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", choices=("autoencoder", "decoder", "unet"), help="unet includes the text encoders")
    parser.add_argument("--start", type=Path, required=True, help="folder of the model to start from")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the trained model; the state lies beside it"
    )
    parser.add_argument("--steps", type=int, required=True, help="the learning rate falls over so many")
    parser.add_argument("--stop-after", type=int, help="the last step to take, if not the last of all")
    parser.add_argument(
        "--pictures", type=int, default=2500, help="how many to draw and choose from (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=16, help="pictures a step of the UNet (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="the highest (default: %(default)s)")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--prompts", type=int, default=120, help="how many (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=4.0, help="(default: %(default)s)")
    parser.add_argument("--lora", type=Path, help="a LoRA to load on top")
    parser.add_argument("--out", type=Path, help="PNG file for a sheet of the pictures")


if __name__ == "__main__":
    hide_neighbours()
    stay_offline()
    stay_quiet()
    sys.exit(main(sys.argv[1:]))
