"""The recipes that ship with the package: find, show, copy and check them."""

from __future__ import annotations

import shutil
from pathlib import Path

from scale_sft.errors import UserError
from scale_sft.files import PACKAGE

from .loading import load
from .options import Config
from .spelling import unknown

FOLDER = PACKAGE / "recipes"


def names() -> list[str]:
    """Recipes by name, without `.yaml`."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def path_of(recipe: str) -> Path:
    """The file behind a name or a path; a name of a shipped recipe goes first.

    Raises:
        UserError: there is neither; names the nearest recipe.
    """
    for path in (FOLDER / f"{recipe.removesuffix('.yaml')}.yaml", Path(recipe)):
        if path.is_file():
            return path
    raise UserError(unknown(f"recipe '{recipe}' (and no such file)", recipe, names()))


def summary(path: Path) -> str:
    """The first line of the comment that a recipe begins with."""
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def copy(recipe: str, target: Path) -> Path:
    """Copy a recipe to a file, or into a folder under its own name.

    Raises:
        UserError: no such recipe, or the file is there already.
    """
    source = path_of(recipe)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UserError(f"recipes: {target} is there already; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def validate(recipe: str) -> Config:
    """Read a recipe as the trainer would.

    Raises:
        UserError: everything that is wrong with it, in one message.
    """
    return load(path_of(recipe), {})
