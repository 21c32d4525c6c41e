"""The rules of who may import whom, held against the code."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "scale_sft"
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
METHOD = [name for name in FILES if name.startswith("spiel/")]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in it; `from a import b` gives a and a.b."""
    package = ["scale_sft", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@cache
def used_names(path: Path) -> set[str]:
    """Dotted names such as `torch.distributed.all_reduce` that occur in a file's expressions."""
    return {ast.unparse(node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}


def test_there_is_something_to_check() -> None:
    assert {"train.py", "cli/main.py", "distributed/cluster.py", "spiel/algorithm.py"} <= set(FILES)


def test_the_floors_hold_and_there_are_no_circles() -> None:
    """The contracts of `tool.importlinter` in pyproject.toml."""
    command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", METHOD)
def test_the_method_needs_torch_alone(file: str) -> None:
    foreign = {name.split(".")[0] for name in imports(FILES[file])} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "scale_sft"}


@pytest.mark.parametrize("file", [name for name in FILES if not name.startswith("distributed/")])
def test_only_distributed_knows_ranks(file: str) -> None:
    for library in ("accelerate", "deepspeed", "torch.distributed"):
        assert not [name for name in imports(FILES[file]) if within(name, library)], library
    assert not [name for name in used_names(FILES[file]) if within(name, "torch.distributed")]


@pytest.mark.parametrize("file", [name for name in FILES if not name.startswith("kernels/gpu/")])
def test_only_kernels_know_triton(file: str) -> None:
    assert not [name for name in imports(FILES[file]) if within(name, "triton")]


MAY_IMPORT_TRAIN = ("__init__.py", "train.py", "cli/train.py", "bench/quality/worker.py", "bench/gpu/training.py")
MAY_IMPORT_TRAIN += ("model_check/checks.py", "model_check/processes.py", "model_check/ranks.py")
"""`scale_sft.train` and `scale-sft train` start a run. Benchmarks and the check of models train as a user would, some many
times in one process: they must go through the real loop."""


@pytest.mark.parametrize("file", [name for name in FILES if name not in MAY_IMPORT_TRAIN])
def test_nothing_imports_the_entry_point(file: str) -> None:
    assert not [name for name in imports(FILES[file]) if within(name, "scale_sft.train")]


def test_the_main_loop_reads_like_the_algorithm() -> None:
    """At most about 40 lines of code."""
    tree = tree_of(FILES["train.py"])
    loop = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    lines = FILES["train.py"].read_text().splitlines()[loop.body[1].lineno - 1 : loop.end_lineno]
    assert len([line for line in lines if line.strip() and not line.strip().startswith("#")]) <= 45


@pytest.mark.parametrize("file", [name for name in FILES if "/" in name and Path(name).stem[0] != "_"])
def test_a_package_names_each_of_its_modules(file: str) -> None:
    """The docstring of a package is its table of contents."""
    path = FILES[file]
    contents = ast.get_docstring(tree_of(path.parent / "__init__.py")) or ""
    assert re.search(rf"\b{path.stem}\b", contents)


MOST_LINES, MOST_PARAMETERS = 400, 7


def test_files_are_short() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def parameters(constructor: ast.FunctionDef) -> int:
    """What a caller can give to `__init__`: all but self; *args and **kwargs count as one each."""
    given = constructor.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs][1:]
    return len(named) + (given.vararg is not None) + (given.kwarg is not None)


def test_constructors_written_by_hand_take_few_parameters() -> None:
    """More of them belong into small dataclasses."""
    found = {}
    for name, path in FILES.items():
        for kind in ast.walk(tree_of(path)):
            for part in kind.body if isinstance(kind, ast.ClassDef) else ():
                if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    found[f"{name}: {kind.name}"] = parameters(part)
    assert found and {name: count for name, count in found.items() if count > MOST_PARAMETERS} == {}


@pytest.mark.parametrize("file", FILES)
def test_peft_is_imported_where_it_is_compared_or_extended_and_trl_where_it_is_compared(file: str) -> None:
    if file != "bench/step/pair_contestants.py":
        assert not [name for name in imports(FILES[file]) if within(name, "trl")]
    if not file.startswith(("peft/", "bench/", "adapters/verify.py")):
        assert not [name for name in imports(FILES[file]) if within(name, "peft") or within(name, "scale_sft.peft")]
