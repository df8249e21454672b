"""What must never happen in this project. Each rule takes the root of a tree and returns one sentence per violation."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Container, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("dinov2_fast", "kernels", "bench", "examples", "hubconf.py")

# A name imports only names further down. Names on one line do not import each other.
ORDER = (
    ("__main__",),
    ("cli",),
    ("visualize", "verify"),
    ("pretraining",),
    ("curation", "integrations", "evaluation", "export", "convert", "installation"),
    ("extraction",),
    ("features",),
    ("inference",),
    ("timm_adapter",),
    ("huggingface", "hub", "data"),
    ("weights",),
    ("model",),
    ("attention_features", "block"),
    ("base_module",),
    ("layers", "layouts", "position_embeddings"),
    ("ops",),
    ("kernels",),
    ("configs", "environment", "extension"),
    ("torch_private", "errors", "logs"),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}

HEAVY = (
    "triton",
    "xformers",
    "transformers",
    "timm",
    "pyarrow",
    "torchvision",
    "onnx",
    "onnxruntime",
    "sklearn",
    "ray",
)
PICKLES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
HARMLESS_IN_PICKLE = ("pickle.UnpicklingError", "pickle.PicklingError")  # what torch.load raises when it refuses
ENVIRONMENT = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")


def python_files(root: Path, *tops: str) -> Iterator[tuple[str, ast.Module]]:
    for top in tops:
        paths = [root / top] if top.endswith(".py") else sorted((root / top).rglob("*.py"))
        for path in paths:
            if path.is_file():
                yield path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """`hub.load` as `torch.hub.load` where the file says `from torch import hub`; "" for what is no dotted name."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, aliases)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def import_aliases(tree: ast.Module) -> dict[str, str]:
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                aliases[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                aliases[name.asname or name.name] = f"{node.module}.{name.name}"
    return aliases


def imported_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, `importlib.import_module("…")` included."""
    aliases = import_aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func, aliases) in ("importlib.import_module", "__import__"):
            yield from ((node.lineno, str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def environment_reads(root: Path) -> list[str]:
    found = []
    for path, tree in python_files(root, "dinov2_fast", "kernels", "hubconf.py"):
        if path == "dinov2_fast/environment.py":
            continue
        aliases = import_aliases(tree)
        names = [(n.lineno, dotted(n, aliases)) for n in ast.walk(tree) if isinstance(n, ast.Attribute | ast.Name)]
        for line, name in {*names, *imported_names(tree)}:
            if name in [f"os.{attribute}" for attribute in ENVIRONMENT]:
                found.append(f"{path}:{line}: {name} is for dinov2_fast/environment.py alone")
    return sorted(found)


def pickle_uses(root: Path) -> list[str]:
    found = []
    for path, tree in python_files(root, *SHIPPED):
        for line, name in imported_names(tree):
            if name.split(".")[0] in PICKLES and name not in HARMLESS_IN_PICKLE:
                found.append(f"{path}:{line}: imports {name}, which can run code hidden in a file")
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and not is_constant(node.value, False):
                found.append(f"{path}:{node.value.lineno}: allow_pickle can run code hidden in a file")
    return found


def is_constant(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def unsafe_loads(root: Path) -> list[str]:
    found = []
    for path, tree in python_files(root, *SHIPPED, "tests"):
        aliases = import_aliases(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func, aliases)
            if name not in ("torch.load", "torch.hub.load_state_dict_from_url"):
                continue
            if not any(word.arg == "weights_only" and is_constant(word.value, True) for word in node.keywords):
                found.append(f"{path}:{node.lineno}: {name} without weights_only=True runs code from the file")
            elif path.startswith("dinov2_fast/") and not path.startswith("dinov2_fast/weights"):
                found.append(f"{path}:{node.lineno}: files with weights are read in dinov2_fast/weights alone")
    return found


def kernels_as_a_package(root: Path) -> list[str]:
    """torch.hub puts the root on `sys.path`: there a package would hide the one named `kernels` that others install."""
    name = "kernels/__init__.py"
    return [f"{name}: the folder stays a namespace package"] if (root / name).is_file() else []


def place(path: str) -> str:
    """The name of ORDER that a file belongs to: "ops" for dinov2_fast/ops/attention.py, "" for the package's own."""
    if path.startswith("kernels/"):
        return "kernels"
    name = path.split("/")[1].removesuffix(".py")
    return "" if name == "__init__" else name


def upward_imports(root: Path) -> list[str]:
    found = []
    for path, tree in python_files(root, "dinov2_fast", "kernels"):
        source = place(path)
        if not source:
            continue  # the package's own file gives out the public names, wherever they live
        if source not in RANK:
            found.append(f"{path}:1: {source} has no place in ORDER")
            continue
        for line, name in imported_names(tree):
            parts = name.split(".")
            if name.startswith("."):
                found.append(f"{path}:{line}: relative import; write it from dinov2_fast")
            elif parts[0] == "kernels":
                found.append(f"{path}:{line}: the folder is imported as dinov2_fast.kernels")
            elif parts[0] == "dinov2_fast" and parts[1:] != ["__version__"] and not may_import(source, parts[1:]):
                found.append(f"{path}:{line}: {source} imports {name}, which stands above or beside it")
    return found


def may_import(source: str, target: list[str]) -> bool:
    """Whether `source` may import dinov2_fast.<target>; a public name, which may be of any file, only at the top."""
    if not target or target[0] not in RANK:
        return source in ("__main__", "cli")
    if source == "kernels":
        return target[0] in ("kernels", "torch_private")
    return target[0] == source or RANK[target[0]] > RANK[source]


def import_circles(root: Path) -> list[str]:
    """Files that import each other, also inside functions and for type checkers alone; one sentence per circle."""
    trees = dict(python_files(root, "dinov2_fast", "kernels"))
    trees.pop("dinov2_fast/__init__.py", None)  # it gives out names of every file, when they are asked for
    graph = {path: {imported_file(name, trees) for _, name in imported_names(tree)} for path, tree in trees.items()}
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
            return found
        except CycleError as error:
            circle = error.args[1]
            found.append(f"{circle[0]}: a circle of imports: {' is imported by '.join(circle)}")
            graph[circle[1]].discard(circle[0])


def imported_file(name: str, files: Container[str]) -> str:
    """The file of this project that holds a full name such as "dinov2_fast.ops.linear.interleave", or ""."""
    path = name.replace(".", "/").removeprefix("dinov2_fast/" if name.startswith("dinov2_fast.kernels") else "")
    candidates = [path, path.rpartition("/")[0]]
    paths = [f"{each}{ending}" for each in candidates for ending in (".py", "/__init__.py")]
    return next((each for each in paths if each in files), "")


def ops_without_entries(root: Path) -> list[str]:
    ops = {path.stem for path in root.glob("dinov2_fast/ops/*.py") if not path.stem.startswith("_")}
    tests = {op: f"tests/ops/test_{op}.py" for op in sorted(ops)}
    found = [f"op {op} has no {test}" for op, test in tests.items() if not (root / test).is_file()]
    for path in sorted([*root.glob("kernels/*.py"), *root.glob("csrc/*.cu")]):
        # linear_bf16.cu: a source of csrc may hold a part of an op, so that parts compile at the same time
        of_an_op = path.suffix == ".cu" and any(path.stem.startswith(f"{op}_") for op in ops)
        of_an_op = of_an_op or path.stem.removesuffix("_backward") in ops
        if path.stem != "common" and not of_an_op:
            found.append(f"{path.relative_to(root).as_posix()} has no dinov2_fast/ops/{path.stem}.py")
    return found


def imports_from_test_files(root: Path) -> list[str]:
    """Code that several test files need lies in tests/helpers, so that a test file can change by itself."""
    found = []
    for path, tree in python_files(root, "tests"):
        for line, name in imported_names(tree):
            if name.startswith("tests.") and any(part.startswith("test_") for part in name.split(".")):
                found.append(f"{path}:{line}: imports {name} from a test file; move it to tests/helpers")
    return found


def import_side_effects(root: Path) -> list[str]:
    """Imports the package in a fresh interpreter: what it prints, what it loads, whether it initialises CUDA."""
    script = (
        "import sys, dinov2_fast\n"
        "loaded = set(sys.modules)\n"
        "import torch\n"
        f"heavy = [name for name in {HEAVY} if name in loaded]\n"
        "sys.exit(f'{heavy} {torch.cuda.is_initialized()}')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, env=environment)
    found = [f"import dinov2_fast prints {run.stdout!r}"] if run.stdout else []
    if run.stderr != "[] False\n":
        found.append(f"import dinov2_fast: heavy imports, CUDA initialised: {run.stderr}")
    return found


RULES: list[Callable[[Path], list[str]]] = [
    environment_reads,
    pickle_uses,
    unsafe_loads,
    kernels_as_a_package,
    upward_imports,
    import_circles,
    ops_without_entries,
    imports_from_test_files,
    import_side_effects,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_project_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


def plant(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


VIOLATIONS: list[tuple[Callable[[Path], list[str]], str, str]] = [
    (environment_reads, "dinov2_fast/model.py", "import os\nx = os.environ['A']"),
    (environment_reads, "dinov2_fast/model.py", "import os as system\nx = system.getenv('A')"),
    (environment_reads, "kernels/attention.py", "from os import environ"),
    (pickle_uses, "dinov2_fast/weights/sources.py", "def f():\n    import pickle"),
    (pickle_uses, "bench/model.py", "from pickle import loads"),
    (pickle_uses, "dinov2_fast/weights/sources.py", "import numpy\nnumpy.load('x', allow_pickle=True)"),
    (unsafe_loads, "dinov2_fast/weights/sources.py", "import torch\ntorch.load('x')"),
    (unsafe_loads, "tests/test_x.py", "from torch import load as read\nread('x', weights_only=False)"),
    (unsafe_loads, "hubconf.py", "from torch import hub\nhub.load_state_dict_from_url('x')"),
    (unsafe_loads, "dinov2_fast/model.py", "import torch\ntorch.load('x', weights_only=True)"),
    (kernels_as_a_package, "kernels/__init__.py", ""),
    (upward_imports, "dinov2_fast/ops/attention.py", "from dinov2_fast.model import DinoVisionTransformer"),
    (upward_imports, "dinov2_fast/ops/attention.py", "from dinov2_fast import model"),
    (upward_imports, "dinov2_fast/ops/attention.py", "from dinov2_fast import DinoVisionTransformer"),
    (upward_imports, "dinov2_fast/ops/attention.py", "import importlib\nimportlib.import_module('dinov2_fast.layers')"),
    (upward_imports, "dinov2_fast/ops/attention.py", "from .. import model"),
    (upward_imports, "dinov2_fast/hub.py", "import dinov2_fast.huggingface"),
    (upward_imports, "dinov2_fast/environment.py", "from dinov2_fast.configs import BACKBONES"),
    (upward_imports, "dinov2_fast/ops/dispatch.py", "import kernels.attention"),
    (upward_imports, "dinov2_fast/helpers.py", ""),
    (upward_imports, "kernels/attention.py", "import dinov2_fast.ops.dispatch"),
    (upward_imports, "kernels/attention.py", "from dinov2_fast.environment import backend_setting"),
    (ops_without_entries, "dinov2_fast/ops/attention.py", ""),
    (ops_without_entries, "kernels/attention_backward.py", ""),
    (ops_without_entries, "csrc/attention.cu", ""),
    (imports_from_test_files, "tests/ops/test_linear.py", "from tests.model.test_model import small"),
    (import_side_effects, "dinov2_fast/__init__.py", "print('hello')"),
    (import_side_effects, "dinov2_fast/__init__.py", "import warnings\nwarnings.warn('hello')"),
    (import_side_effects, "dinov2_fast/__init__.py", "import sys\nsys.modules['timm'] = sys"),
    (import_side_effects, "dinov2_fast/__init__.py", "import torch\ntorch.cuda._initialized = True"),
]


@pytest.mark.parametrize(("rule", "path", "text"), VIOLATIONS)
def test_a_violation_is_found(rule: Callable[[Path], list[str]], path: str, text: str, tmp_path: Path) -> None:
    plant(tmp_path / path, text)
    assert len(rule(tmp_path)) == 1


def test_a_circle_through_functions_packages_and_type_checkers_is_found(tmp_path: Path) -> None:
    plant(tmp_path / "dinov2_fast/hub/__init__.py", "from dinov2_fast.hub.heads import Head")
    plant(tmp_path / "dinov2_fast/hub/heads.py", "def f():\n    from dinov2_fast import layers")
    plant(tmp_path / "dinov2_fast/layers.py", "if TYPE_CHECKING:\n    from dinov2_fast.hub import Head")
    plant(tmp_path / "kernels/linear.py", "import dinov2_fast.kernels.common")
    plant(tmp_path / "kernels/common.py", "from dinov2_fast.kernels import linear")
    assert len(import_circles(tmp_path)) == 2


ALLOWED: list[tuple[Callable[[Path], list[str]], str, str]] = [
    (environment_reads, "dinov2_fast/environment.py", "import os\nx = os.environ.get('A')"),
    (environment_reads, "dinov2_fast/model.py", "import os\nx = os.fspath('A')  # not os.environ"),
    (pickle_uses, "dinov2_fast/model.py", '"""Never `import pickle`."""'),
    (pickle_uses, "dinov2_fast/weights/sources.py", "from pickle import UnpicklingError"),
    (unsafe_loads, "dinov2_fast/weights/sources.py", "import torch\ntorch.load('x', weights_only=True)"),
    (upward_imports, "dinov2_fast/cli/extract.py", "from dinov2_fast import __version__, load"),
    (upward_imports, "dinov2_fast/layers.py", "from dinov2_fast.ops import attention\nfrom dinov2_fast import configs"),
    (upward_imports, "dinov2_fast/model.py", "from dinov2_fast import __version__"),
    (upward_imports, "kernels/attention_backward.py", "from dinov2_fast.kernels import attention"),
    (import_side_effects, "dinov2_fast/__init__.py", "import torch, logging\nlogging.getLogger('x').debug('hello')"),
]


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_what_is_allowed_passes(rule: Callable[[Path], list[str]], path: str, text: str, tmp_path: Path) -> None:
    plant(tmp_path / path, text)
    assert rule(tmp_path) == []
