"""What the package shows to the outside."""

import subprocess
import sys
from pathlib import Path

import pytest

import scale_sft

PACKAGE = Path(scale_sft.__file__).parent


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "numpy", "yaml", "click"]
    code = f"import sys, scale_sft; print([name for name in {heavy} if name in sys.modules], dir(scale_sft))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert found.stdout.startswith("[] [") and "'attach'" in found.stdout


@pytest.mark.parametrize("name", scale_sft.__all__)
def test_every_public_name_can_be_imported_and_has_a_docstring(name) -> None:
    value = getattr(scale_sft, name)
    assert name == "__version__" or value.__doc__
