"""The import order is law: who may import whom, and what a web process never loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
APPS = ("datasets", "models_registry", "runs")
# Files of an app by layer; one may import its own layer and those above it in this list.
LAYERS = [
    {"enums"},
    {"models"},
    {"selectors"},
    {"services"},
    {"forms", "tasks"},
    {"api", "views", "admin", "consumers"},
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
# The top of the project: it knows every app.
TOP = {"lorapilot.urls", "lorapilot.asgi", "lorapilot.management", "lorapilot.settings"}
MAY_IMPORT = {
    "lorapilot": {"lorapilot"},
    "datasets": {"lorapilot", "datasets"},
    "models_registry": {"lorapilot", "models_registry"},
    "runs": {"lorapilot", "datasets", "models_registry", "runs"},
    "lora_trainer": {"lora_trainer"},
}
SHARED_WITH_THE_TRAINER = {
    f"lora_trainer.{name}" for name in ("buckets", "config", "errors", "safetensors_header", "state_files")
}
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "tensorboard", "xformers"}
WITHOUT_DJANGO = [
    *(path.relative_to(ROOT) for path in sorted((ROOT / "lora_trainer").rglob("*.py"))),
    *(
        path.relative_to(ROOT)
        for path in sorted((ROOT / "runs" / "supervision").rglob("*.py"))
        if path.name != "follow.py"
    ),
    Path("runs/logfile.py"),
    Path("runs/tensorboard/serve.py"),
    Path("lorapilot/children.py"),
    Path("lorapilot/listening.py"),
]


def files_of(package):
    return [path for path in sorted((ROOT / package).rglob("*.py")) if "migrations" not in path.parts]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path, *, also_in_functions=True):
    """The modules that a file imports, `from a import b` as `a.b` (b may be a module or a name in a)."""
    tree = ast.parse(path.read_text(), str(path))
    nodes = ast.walk(tree) if also_in_functions else _outside_functions(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _outside_functions(tree):
    """What runs on import, without what only type checkers read."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def is_top(module):
    return any(module == top or module.startswith(f"{top}.") for top in TOP)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_lies_below_them(package):
    ours = set(MAY_IMPORT)
    wrong = []
    for path in files_of(package):
        if is_top(module_of(path)):
            continue
        for imported in imports_of(path):
            home = imported.split(".")[0]
            is_shared = imported == "lora_trainer" or any(
                imported == name or imported.startswith(f"{name}.") for name in SHARED_WITH_THE_TRAINER
            )
            if home in ours - MAY_IMPORT[package] and not is_shared:
                wrong.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert wrong == []


@pytest.mark.parametrize("app", [*APPS, "lorapilot"])
def test_files_of_an_app_import_only_lower_layers(app):
    wrong = []
    for name, layer in LAYER_OF.items():
        path = ROOT / app / f"{name}.py"
        if not path.exists():
            continue
        for imported in imports_of(path, also_in_functions=False):
            parts = imported.split(".")
            if parts[0] == app and len(parts) > 1 and LAYER_OF.get(parts[1], -1) > layer:
                wrong.append(f"{app}/{name}.py imports {imported}")
    assert wrong == []


@pytest.mark.parametrize("path", WITHOUT_DJANGO, ids=str)
def test_process_code_imports_no_django(path):
    assert [
        name for name in imports_of(ROOT / path) if name.split(".")[0] in {"django", "django_q", "rest_framework"}
    ] == []


def test_web_side_loads_no_machine_learning():
    program = (
        "import sys, lorapilot.asgi, lorapilot.urls, runs.tasks, runs.reconcile\n"
        f"print(sorted({HEAVY!r} & {{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_tensorboard_is_imported_by_its_own_program_only():
    """Web processes would grow by what it and its plugins load, and would run what they do."""
    importing = {
        str(path.relative_to(ROOT))
        for package in MAY_IMPORT
        for path in files_of(package)
        for name in imports_of(path)
        if name.split(".")[0] in {"tensorboard", "werkzeug"}
    }
    assert importing == {"runs/tensorboard/serve.py"}


def test_shared_files_of_the_trainer_load_no_torch():
    program = "".join(f"import {name}\n" for name in sorted(SHARED_WITH_THE_TRAINER))
    program += f"import sys\nprint(sorted({HEAVY | {'django'}!r} & {{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
