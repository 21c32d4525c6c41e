"""The tasks of `bench quality`, and the data on which it measures what a model still knows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scale_sft.config.options import OPTIONS
from scale_sft.config.spelling import unknown
from scale_sft.errors import UserError

from .contestants import SET_BY_THE_BENCH

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_OPTION = re.compile(r"(\w+)=(.*)", re.DOTALL)
_OF_TASKS = {"data", "optimizer", "run"}
_OF_RETAINED = {"max_eval_examples", "max_length", "loss_on", "chat_template"}


@dataclass(frozen=True)
class Task:
    """Something to learn: options of the configuration that differ from those of the other tasks."""

    name: str = ""  # empty: the only task, described by the options that all share
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Retained:
    """Data that a model should still predict after it has learned something else."""

    name: str
    source: str  # like `eval_data`; empty: the held-out data of the task of this name
    options: Mapping[str, str] = field(default_factory=dict)  # of the configuration's section data


def read_tasks(texts: Sequence[str]) -> tuple[Task, ...]:
    """Parse `NAME=TRAIN,EVAL` with any number of `,option=value` each; without texts one task without a name.

    Raises:
        UserError: it is written otherwise, a name comes twice, or an option is not one of a task.
    """
    tasks = []
    for text in texts:
        example = "gsm8k=train.jsonl,test.jsonl,answer_pattern=gsm8k"
        name, positions, options = _parsed("--task", text, example)
        for option in options:
            if option in SET_BY_THE_BENCH or OPTIONS[option] not in _OF_TASKS:
                raise UserError(
                    f"--task {name}: got {option}, expected options of data, optimizer or run that the bench does not "
                    "set itself. Fix: give it to all tasks, as an option of the command"
                )
        if len(positions) > 2 or (len(positions) < 2 and not options):
            raise UserError(f"--task: got '{text}', expected NAME=TRAIN,EVAL and options, such as {example}")
        sources = dict(zip(("train_data", "eval_data"), positions, strict=False))
        tasks.append(Task(name, {**sources, **options}))
    _refuse_twice("--task", [task.name for task in tasks])
    return tuple(tasks) or (Task(),)


def read_retained(texts: Sequence[str], tasks: Sequence[Task]) -> tuple[Retained, ...]:
    """Parse `NAME=SOURCE` with any number of `,option=value` each, or the name of a task.

    Raises:
        UserError: it is written otherwise, a name comes twice, or an option is not one of evaluation data.
    """
    known = [task.name for task in tasks if task.name]
    found = []
    for text in texts:
        if "=" not in text:
            if text not in known:
                told = unknown(f"task {text!r}", text, known) if known else f"got '{text}'"
                raise UserError(f"--retain: {told}; expected NAME=FILE, or the name of a --task")
            found.append(Retained(text, ""))
            continue
        name, positions, options = _parsed("--retain", text, "news=news.jsonl")
        if len(positions) != 1:
            raise UserError(f"--retain: got '{text}', expected NAME=FILE, such as news=news.jsonl")
        for option in options:
            if option not in _OF_RETAINED:
                raise UserError(f"--retain {name}: {unknown(f'option {option!r}', option, sorted(_OF_RETAINED))}")
        found.append(Retained(name, positions[0], options))
    _refuse_twice("--retain", [one.name for one in found])
    return tuple(found)


def retained_by(task: Task, tasks: Sequence[Task], retained: Sequence[Retained]) -> tuple[Retained, ...]:
    """Select what is to be retained while `task` is learned, with sources: all but the task itself."""
    options = {one.name: one.options for one in tasks}
    found = []
    for one in retained:
        if one.source:
            found.append(one)
        elif one.name != task.name:
            given = options[one.name]
            kept = {name: value for name, value in given.items() if name in _OF_RETAINED}
            found.append(Retained(one.name, given.get("eval_data", ""), kept))
    return tuple(found)


def retained_examples(retained: Retained, inputs: Any) -> Any:
    """Read and tokenise the data of `retained` as a run's held-out data; in plain text every token counts.

    Raises:
        UserError: the data or their options are invalid.
    """
    from scale_sft.config.loading import load
    from scale_sft.data.cache import load_examples, with_writable_cache
    from scale_sft.model.loading import max_length

    options = {**retained.options, "eval_data": retained.source}
    if "loss_on" not in options and _is_plain_text(retained.source):
        options["loss_on"] = "all"
    data = load(inputs.config, options).data
    data = replace(data, max_length=max_length(data.max_length, inputs.model_config))
    data, _ = with_writable_cache(data, Path(inputs.config.run.output_dir) / "cache")
    return load_examples(retained.source, "eval", inputs.tokenizer, data, data.max_eval_examples)


def _is_plain_text(source: str) -> bool:
    """Tell whether the rows of a source are texts without a prompt."""
    from scale_sft.data.opening import open_sources
    from scale_sft.data.sources import parse_sources, recognise

    with TemporaryDirectory() as scratch:
        parts = open_sources(parse_sources(source, "eval"), "eval", 1, True, scratch=Path(scratch))
        return all(recognise(part.columns, part.source, part.origin) == "text" for part in parts)


def _parsed(option: str, text: str, example: str) -> tuple[str, list[str], dict[str, str]]:
    """Split `NAME=a,b,option=value`: its name, the parts without an option, and the options."""
    name, equals, rest = text.partition("=")
    if not equals or not _NAME.fullmatch(name) or not rest:
        raise UserError(f"{option}: got '{text}', expected NAME=..., such as {example}")
    positions, options = [], {}
    for part in rest.split(","):
        setting = _OPTION.fullmatch(part)
        if setting is None:
            positions.append(part)
        elif setting[1] not in OPTIONS:
            raise UserError(f"{option} {name}: {unknown(f'option {setting[1]!r}', setting[1], OPTIONS)}")
        else:
            options[setting[1]] = setting[2]
    return name, positions, options


def _refuse_twice(option: str, names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{option}: got '{twice}' twice, expected names that differ")
