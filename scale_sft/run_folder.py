"""The folder of a run: claimed once, filled with files that appear whole."""

from __future__ import annotations

from pathlib import Path

from .config import Config, to_yaml
from .errors import UserError
from .export import Adapter, save_adapter
from .files import write_text

OWN_FILES = ("config.yaml", "metrics.jsonl", "adapter", "checkpoints", "merged")


class RunFolder:
    """Paths of a run's files. `claim` refuses a folder that holds another run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"

    def refuse_if_taken(self) -> None:
        """Raises UserError if the folder holds a run already: nothing of it is overwritten."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir: {self.path} is a file; choose a folder")
        for name in OWN_FILES:
            if (self.path / name).exists():
                raise UserError(
                    f"output_dir: {self.path} already holds a run ({name}); choose a new folder, or move that one away"
                )

    def claim(self, config: Config) -> None:
        """Make the folder and write the resolved configuration."""
        self.refuse_if_taken()
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", to_yaml(config))

    def save_adapter(self, adapter: Adapter) -> None:
        save_adapter(adapter, self.adapter)
