"""The rules of who may import whom, held against the code."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

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


def imported(files: Iterable[str], *packages: str) -> dict[str, list[str]]:
    """What these files import of some packages, by file; those that import nothing of them are left out."""
    of = lambda file: sorted(name for name in imports(FILES[file]) if any(within(name, one) for one in packages))
    return {file: names for file in files if (names := of(file))}


def test_there_is_something_to_check() -> None:
    assert {"train.py", "cli/main.py", "distributed/cluster.py", "spiel/algorithm.py"} <= set(FILES)


def test_the_floors_hold_and_there_are_no_circles() -> None:
    """The contracts of `tool.importlinter` in pyproject.toml."""
    command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_method_needs_torch_alone() -> None:
    needed = {file: {name.split(".")[0] for name in imports(FILES[file])} for file in METHOD}
    known = {"torch", "scale_sft", *sys.stdlib_module_names}
    assert {file: names - known for file, names in needed.items() if names - known} == {}


def test_only_distributed_knows_ranks() -> None:
    others = [name for name in FILES if not name.startswith("distributed/")]
    assert imported(others, "accelerate", "deepspeed", "torch.distributed") == {}
    assert [file for file in others if any(within(name, "torch.distributed") for name in used_names(FILES[file]))] == []


def test_only_kernels_know_triton() -> None:
    assert imported([name for name in FILES if not name.startswith("kernels/gpu/")], "triton") == {}


MAY_IMPORT_TRAIN = ("__init__.py", "train.py", "cli/train.py", "bench/quality/worker.py", "bench/gpu/training.py")
MAY_IMPORT_TRAIN += ("model_check/checks.py", "model_check/processes.py", "model_check/ranks.py")
"""`scale_sft.train` and `scale-sft train` start a run. Benchmarks and the check of models train as a user would, some many
times in one process: they must go through the real loop."""


def test_nothing_imports_the_entry_point() -> None:
    assert imported([name for name in FILES if name not in MAY_IMPORT_TRAIN], "scale_sft.train") == {}


def test_the_main_loop_reads_like_the_algorithm() -> None:
    """At most about 40 lines of code."""
    tree = tree_of(FILES["train.py"])
    loop = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    lines = FILES["train.py"].read_text().splitlines()[loop.body[1].lineno - 1 : loop.end_lineno]
    assert len([line for line in lines if line.strip() and not line.strip().startswith("#")]) <= 45


def test_a_package_names_each_of_its_modules() -> None:
    """The docstring of a package is its table of contents."""
    contents = lambda path: ast.get_docstring(tree_of(path.parent / "__init__.py")) or ""
    modules = {name: path for name, path in FILES.items() if "/" in name and path.stem[0] != "_"}
    assert [name for name, path in modules.items() if not re.search(rf"\b{path.stem}\b", contents(path))] == []


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


def test_peft_is_imported_where_it_is_compared_or_extended_and_trl_where_it_is_compared() -> None:
    assert list(imported(FILES, "trl")) == ["bench/step/pair_contestants.py"]
    extends = ("peft/", "bench/", "adapters/verify.py")
    assert imported([name for name in FILES if not name.startswith(extends)], "peft", "scale_sft.peft") == {}
