"""What the package shows to the outside, and the shape of what is inside."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import scale_sft

PACKAGE = Path(scale_sft.__file__).parent
MOST_PARAMETERS = 7


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "numpy", "yaml", "click"]
    code = f"import sys, scale_sft; print([name for name in {heavy} if name in sys.modules], dir(scale_sft))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert found.stdout.startswith("[] [") and "'attach'" in found.stdout


@pytest.mark.parametrize("name", scale_sft.__all__)
def test_every_public_name_can_be_imported_and_has_a_docstring(name) -> None:
    value = getattr(scale_sft, name)
    assert name == "__version__" or value.__doc__


def test_no_constructor_has_more_parameters_than_a_reader_can_hold() -> None:
    too_many = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or node.name != "__init__":
                continue
            arguments = node.args
            count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]) - 1
            if count > MOST_PARAMETERS:
                too_many.append(f"{file.relative_to(PACKAGE)}:{node.lineno}: {count}")
    assert not too_many
