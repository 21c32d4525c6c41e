"""The recipes that ship with the package: find, describe and copy them."""

from __future__ import annotations

from pathlib import Path

from scale_sft.errors import UserError
from scale_sft.files import PACKAGE, write_text

from .options import ConfigError
from .spelling import unknown

FOLDER = PACKAGE / "recipes"


def names() -> list[str]:
    """Recipes by name, without `.yaml`."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def path_of(recipe: str | Path) -> Path:
    """Find the file behind a name or a path.

    `demo` is the shipped recipe; `demo.yaml` and `./demo` are files of yours, if they exist.

    Raises:
        ConfigError: there is neither; names the nearest recipe.
    """
    name, own = str(recipe), Path(recipe).expanduser()
    shipped = name.removesuffix(".yaml")
    if name in names():
        return FOLDER / f"{name}.yaml"
    if own.exists() and not own.is_dir():  # a pipe is welcome
        return own
    if shipped in names():
        return FOLDER / f"{shipped}.yaml"
    if own.suffix or own.name != name:
        raise ConfigError(f"recipe {recipe}: no such file; shipped recipes have names: {', '.join(names())}")
    raise ConfigError(unknown(f"recipe '{name}' (and no such file)", name, names()))


def summary(path: Path) -> str:
    """Return what a recipe is for: the sentence that its opening comment begins with."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.startswith("#  "):  # code, or the lines that launch it
            break
        words.append(line.lstrip("# ").strip())
        if words[-1].endswith((".", ":")):
            break
    return " ".join(words)


def copy(recipe: str, target: Path) -> Path:
    """Copy a recipe to a new file, or into a folder under its own name; returns the file.

    Raises:
        UserError: no such recipe, or the file exists.
    """
    source = path_of(recipe)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UserError(f"recipes cp: {target} exists and is not overwritten. Fix: name another file")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, source.read_text(encoding="utf-8"))
    return target
