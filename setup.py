"""Carry the launch files in the wheel: what pyproject.toml cannot say. Everything else is said there."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

LAUNCH_FILES = ("launch/*.yaml", "launch/*.sbatch", "ds_configs/*")


class BuildWithLaunchFiles(build_py):
    """Copies launch/ and ds_configs/ into the package; an editable installation reads them from the clone."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for pattern in LAUNCH_FILES:
            for source in sorted(Path().glob(pattern)):
                target = Path(self.build_lib, "scale_sft", "assets", "launch_files", source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithLaunchFiles})
