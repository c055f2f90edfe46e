"""Start the trainer: `python -m lora_trainer config.toml` or `python -P …/lora_trainer/__main__.py config.toml`.

The second way works from any folder and without the package on `sys.path`. Both ways hide what lies beside the
package: LoRA Pilot has an app named `datasets`, and transformers and accelerate would take it for Hugging Face's.
"""

import importlib.util
import logging
import os
import sys
from pathlib import Path

PACKAGE_FOLDER = Path(__file__).resolve().parent


def register_package() -> None:
    """Make this folder importable as `lora_trainer` when Python was given only the path of this file."""
    spec = importlib.util.spec_from_file_location(
        "lora_trainer", PACKAGE_FOLDER / "__init__.py", submodule_search_locations=[str(PACKAGE_FOLDER)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{PACKAGE_FOLDER} cannot be loaded as a package")
    package = importlib.util.module_from_spec(spec)
    sys.modules["lora_trainer"] = package
    spec.loader.exec_module(package)


def hide_neighbours() -> None:
    """Take the package's folder and its parent off `sys.path`, unless the parent is where packages are installed."""
    hidden = {PACKAGE_FOLDER}
    if PACKAGE_FOLDER.parent.name not in ("site-packages", "dist-packages"):
        hidden.add(PACKAGE_FOLDER.parent)
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in hidden]


def stay_offline() -> None:
    """Every file comes from this machine; set before any library reads these."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")


def stay_quiet() -> None:
    """What libraries say while they are imported (xformers without a GPU, no torchvision) helps nobody in our log."""
    os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
    logging.getLogger("xformers").setLevel(logging.ERROR)


if __name__ == "__main__":
    if not __package__:
        register_package()
    import lora_trainer  # noqa: F401 - found while its parent folder is still on the path

    hide_neighbours()
    stay_offline()
    stay_quiet()
    from lora_trainer.command import leave, main

    leave(main(sys.argv[1:]))
