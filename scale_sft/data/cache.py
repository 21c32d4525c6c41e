"""Tokenised once, used by every rank and run: a folder of Arrow files per combination of data, tokenizer and options.

Whoever comes first does the work under a file lock; the others wait for the lock, not in a collective.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from scale_sft.config.options import DataConfig
from scale_sft.errors import UserError
from scale_sft.files import write_json, write_text
from scale_sft.version import __version__

from .examples import Examples
from .formats import ENCODED, Encoder
from .notes import Notes
from .opening import Part, open_sources
from .preference_formats import MARKED, PAIRED, PreferenceEncoder
from .preferences import KINDS, Preferences
from .sources import Source, parse_sources

CACHE_FORMAT = 2
PREFERENCE_FORMAT = 2
"""Of pairs and marked answers, on top of CACHE_FORMAT: keys of sft do not change with it."""
BATCH_ROWS = 1000
ROWS_PER_WORKER = 20_000
"""Below this many rows per process, starting processes costs more than it saves."""


def load_examples(
    source: str | Sequence[str],
    split: str,
    tokenizer: Any,
    config: DataConfig,
    limit: int | None,
    *,
    kind: str = "sft",
    progress: bool = False,
    refresh: bool = False,
) -> Examples:
    """Tokenise and mask the examples of one or several sources (see `sources`), or take them from the cache.

    Args:
        split: 'train' or 'eval': which of the shipped examples 'demo' means, and the default split of hub data.
        limit: use only so many rows.
        kind: of examples, a key of `KINDS`.
        refresh: tokenise again even if the cache has them.

    Raises:
        UserError: data that is missing, broken (with file and line) or leaves no token to learn from.
    """
    sources = parse_sources(source, split, kind)
    name = source if isinstance(source, str) else ", ".join(source)
    key = cache_key(sources, split, tokenizer, config, limit)
    root = cache_folder(config)
    work = (sources, split, tokenizer, config, limit, progress)
    try:
        _make(root, key, work, refresh)
    except OSError as error:
        raise UserError(f"cache_dir: {root} cannot be used: {error}; choose another folder with cache_dir") from None
    return _open(root / key, name, config, kind)


def with_writable_cache(data: DataConfig, instead: Path) -> tuple[DataConfig, tuple[str, ...]]:
    """Keep tokenised data in the folder `instead` if the usual cache cannot be written; returns notes for the user.

    A folder that the user chose with `cache_dir` has no substitute.
    """
    usual = cache_folder(data)
    if data.cache_dir:
        return data, ()
    try:
        usual.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=usual):
            return data, ()
    except OSError as error:
        note = f"cache_dir: {usual} cannot be written ({error.strerror}); tokenised data is kept in {instead}"
        return replace(data, cache_dir=str(instead)), (note,)


def _make(root: Path, key: str, work: tuple[Any, ...], refresh: bool) -> None:
    """Build the cache folder `key`, unless it is there or another process does."""
    from filelock import FileLock

    folder, failure = root / key, root / f"{key}.error"
    arrived = time.time()
    made = folder / "manifest.json"
    if made.exists() and not refresh:
        return
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{key}.lock"):
        if failure.exists() and failure.stat().st_mtime >= arrived:  # the process before met it just now
            raise UserError(failure.read_text(encoding="utf-8"))
        if not made.exists() or (refresh and made.stat().st_mtime < arrived):
            _build_or_tell(folder, failure, *work)


def cache_folder(config: DataConfig) -> Path:
    """Return where tokenised data is kept: `cache_dir`, or scale_sft/ in the cache of Hugging Face (HF_HOME)."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    from datasets.config import HF_CACHE_HOME

    return Path(HF_CACHE_HOME) / "scale_sft"


def cache_key(sources: Sequence[Source], split: str, tokenizer: Any, config: DataConfig, limit: int | None) -> str:
    """Return 32 hex digits over everything that the encoded examples depend on."""
    content = {
        "format": CACHE_FORMAT,
        "version": __version__,
        "sources": [source.identity() for source in sources],
        "split": split,
        "limit": limit,
        "streaming": config.streaming,
        "max_length": config.max_length,
        "loss_on": config.loss_on,
        "tokenizer": tokenizer_identity(tokenizer),
    }
    if any(source.kind != "sft" for source in sources):  # keys of sft stay as they were before there were others
        content["kind"] = f"{sources[0].kind} {PREFERENCE_FORMAT}"
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def tokenizer_identity(tokenizer: Any) -> str:
    """Hash a tokenizer's vocabulary and rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = None
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules["padding"] = rules["truncation"] = None  # what the last call left there
    content = [
        rules or sorted(tokenizer.get_vocab().items()),
        type(tokenizer).__name__,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _build_or_tell(folder: Path, failure: Path, *arguments: Any) -> None:
    """Build the cache; a mistake in the data is left in a file, so that waiting processes say it without the work."""
    try:
        _build(folder, *arguments)
    except UserError as error:
        write_text(failure, str(error))
        raise
    with suppress(FileNotFoundError):
        failure.unlink()


def _build(
    folder: Path,
    sources: Sequence[Source],
    split: str,
    tokenizer: Any,
    config: DataConfig,
    limit: int | None,
    progress: bool,
) -> None:
    """Encode everything into a folder next to it, which takes its name once it is complete."""
    work = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        notes, rows = Notes(work / "notes"), work / "rows"
        with _progress_bars(progress):
            parts = open_sources(sources, split, limit, config.streaming, scratch=rows, notes=notes)
            encoded = [_encode(part, n, work, tokenizer, config, notes) for n, part in enumerate(parts)]
        files = [Path(file["filename"]).name for part in encoded for file in part.cache_files]
        said = notes.all()
        for spent in (rows, work / "notes"):
            shutil.rmtree(spent, ignore_errors=True)
        names = [source.name for source in sources]
        write_json(work / "manifest.json", {"files": files, "sources": names, "notes": said})
        shutil.rmtree(folder, ignore_errors=True)
        work.replace(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


_ENCODERS: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "sft": (Encoder, ENCODED),
    "pairs": (PreferenceEncoder, PAIRED),
    "marked": (PreferenceEncoder, MARKED),
}
"""Encoder and its columns, by the kind of examples."""


def _encode(part: Part, number: int, work: Path, tokenizer: Any, config: DataConfig, notes: Notes) -> Any:
    """Encode one part by `datasets.map` into Arrow files of the folder `work`."""
    import datasets

    assert config.max_length is not None
    make, columns = _ENCODERS[part.source.kind]
    encoder = make(part, tokenizer, max_length=config.max_length, loss_on=config.loss_on, notes=notes)
    one, many = datasets.Value("int32"), datasets.List(datasets.Value("int32"))
    features = {name: many if name in ("input_ids", "spans") else one for name in columns}
    rows = len(part.rows)
    wanted = config.preprocess_workers or max(1, min(os.cpu_count() or 1, rows // ROWS_PER_WORKER))
    return part.rows.map(
        encoder,
        with_indices=True,
        batched=True,
        batch_size=BATCH_ROWS,
        remove_columns=part.rows.column_names,
        features=datasets.Features(features),
        num_proc=min(wanted, rows) if min(wanted, rows) > 1 else None,
        cache_file_name=str(work / f"part{number:04d}.arrow"),
        new_fingerprint=f"{work.name[1:33]}-{number}",
        load_from_cache_file=False,
        desc=f"tokenising {Path(part.origin).name}",
    )


class _progress_bars:
    """Shows or hides the progress bars of `datasets` for a while."""

    def __init__(self, show: bool):
        self.show = show

    def __enter__(self) -> None:
        import datasets

        self.shown = datasets.is_progress_bar_enabled()
        self._set(self.show)

    def __exit__(self, *exception: object) -> None:
        self._set(self.shown)

    def _set(self, show: bool) -> None:
        import datasets

        (datasets.enable_progress_bars if show else datasets.disable_progress_bars)()


def _open(folder: Path, name: str, config: DataConfig, kind: str) -> Examples:
    """Open the examples of a cache folder, mapped into memory."""
    import datasets

    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = [datasets.Dataset.from_file(str(folder / file)) for file in manifest["files"]]
        examples = KINDS[kind](datasets.concatenate_datasets(files), name, notes=tuple(manifest["notes"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cache_dir: {folder} is damaged ({error!r:.100}); remove that folder") from None
    if isinstance(examples, Preferences) and not len(examples):
        reasons = "; ".join(f"{count:,} because {reason}" for reason, count in examples.drops.items())
        raise UserError(
            f"data: {name}: no example to learn from is left, all are dropped: {reasons}. Fix: check the data, or "
            f"raise max_length ({config.max_length})"
        )
    if not len(examples):
        raise UserError(
            f"data: {name}: no token to learn from is left: the prompt of each of its {examples.dropped:,} examples "
            f"fills max_length ({config.max_length}); raise max_length"
        )
    return examples
