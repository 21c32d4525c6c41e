"""`scale-sft launch-files`: configurations for clusters and `accelerate launch`, also from an installed package."""

from __future__ import annotations

from pathlib import Path

import click

from scale_sft.errors import UserError

from .commands import Commands

_PATTERNS = ("launch/*.yaml", "launch/*.sbatch", "ds_configs/*")


@click.group("launch-files", cls=Commands)
def launch_files() -> None:
    r"""List or copy configurations for `accelerate launch` and DeepSpeed, and the Slurm job script.

    \b
    scale-sft launch-files cp .
    accelerate launch --config_file launch/zero3_8gpu.yaml -m scale_sft.train --config RECIPE
    sbatch launch/slurm_multinode.sbatch RECIPE
    """


@launch_files.command("ls")
def list_files() -> None:
    """List the files with their purposes."""
    found = _files()
    width = max(len(str(file)) for file in found)
    for file, source in found.items():
        click.echo(f"{file!s:<{width}}  {_purpose(source)}".rstrip())


@launch_files.command("cp")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def copy(folder: Path) -> None:
    r"""Copy the files to FOLDER/launch and FOLDER/ds_configs. Nothing is overwritten.

    \b
    scale-sft launch-files cp .
    """
    from scale_sft.files import write_text

    found = _files()
    present = [str(folder / file) for file in found if (folder / file).exists()]
    if present:
        raise UserError(f"launch-files cp: {present[0]} exists and is not overwritten. Fix: choose another folder")
    for file, source in found.items():
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, source.read_text(encoding="utf-8"))
        click.echo(f"wrote {target}")


def _files() -> dict[Path, Path]:
    """Map paths below the target folder to the files."""
    from scale_sft.files import LAUNCH_FILES

    found = {
        file.relative_to(LAUNCH_FILES): file for pattern in _PATTERNS for file in sorted(LAUNCH_FILES.glob(pattern))
    }
    if not found:
        raise UserError(f"launch-files: none in {LAUNCH_FILES}. Fix: install the package, or use a whole clone")
    return found


def _purpose(source: Path) -> str:
    """Read the first sentence of a file's opening comment, or a DeepSpeed configuration's row in the README."""
    if source.suffix == ".json":
        readme = source.with_name("README.md").read_text(encoding="utf-8")
        rows = [line for line in readme.splitlines() if line.startswith(f"| `{source.name}` |")]
        return rows[0].strip("| ").split("|", 1)[1].strip() if rows else ""
    lines = source.read_text(encoding="utf-8").splitlines()
    comments = [line.lstrip("# ") for line in lines if line.startswith("# ")]
    return comments[0].split(". ")[0].rstrip(".") if comments and source.suffix != ".md" else ""


COMMANDS = (launch_files,)
