"""Load a configuration: a YAML recipe, then the options that win over it; report all mistakes together."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .options import OPTIONS, SECTIONS, Config, ConfigError
from .recipes import path_of
from .rules import _together
from .spelling import unknown


def load(recipe: str | Path | Config | None, overrides: Mapping[str, Any]) -> Config:
    """The configuration of a recipe (YAML) with options that win over it.

    Args:
        recipe: path of a YAML file, name of a shipped recipe, or a whole configuration; None for the defaults.
        overrides: option name -> value, a string (as typed) or already of the right type; None is ignored.

    Raises:
        ConfigError: everything that is wrong with it, in one message.
    """
    mistakes: list[str] = []
    sections = _read_sections(recipe, overrides, mistakes)
    if not mistakes:
        config = Config(**sections)
        mistakes += _together(config)
    _refuse(mistakes, recipe)
    return config


def load_sections(recipe: str | Path | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a configuration by name, for commands that need only some: no run must be possible with them.

    Raises:
        ConfigError: everything that is wrong with single options, in one message.
    """
    mistakes: list[str] = []
    sections = _read_sections(recipe, overrides, mistakes)
    _refuse(mistakes, recipe)
    return sections


def _refuse(mistakes: list[str], recipe: str | Path | Config | None) -> None:
    if mistakes:
        where = f" in {recipe}" if isinstance(recipe, (str, Path)) else ""
        raise ConfigError(f"{len(mistakes)} mistake{'s' * (len(mistakes) > 1)}{where}:\n  " + "\n  ".join(mistakes))


def _read_sections(
    recipe: str | Path | Config | None, overrides: Mapping[str, Any], mistakes: list[str]
) -> dict[str, Any]:
    """All sections of a recipe with options that win over it; mistakes are appended."""
    values: dict[str, Any] = {}
    if isinstance(recipe, Config):
        values = {name: getattr(getattr(recipe, section), name) for name, section in OPTIONS.items()}
    elif recipe is not None:
        values = _read_recipe(recipe, mistakes)
    given = {name: value for name, value in overrides.items() if value is not None}
    budgets = ("density", "tunable_weights", "rank_equivalent")
    for alternatives in (budgets, ("steps", "epochs")):  # one given on the command line replaces the recipe's
        if any(name in given for name in alternatives):
            values = {name: value for name, value in values.items() if name not in alternatives}
    for name, value in given.items():
        if name not in OPTIONS:
            mistakes.append(unknown(f"option --{name}", name, OPTIONS))
        else:
            values[name] = value
    return {section: _section(kind, values, mistakes) for section, kind in SECTIONS.items()}


def _read_recipe(recipe: str | Path, mistakes: list[str]) -> dict[str, Any]:
    """Option values of a YAML file, flattened over its sections."""
    try:
        tree = yaml.safe_load(path_of(recipe).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe {recipe}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {recipe}: expected sections ({', '.join(SECTIONS)}), got {type(tree).__name__}")
    values: dict[str, Any] = {}
    for section, content in tree.items():
        if section not in SECTIONS:
            hint = f"; '{section}' belongs in section '{OPTIONS[section]}'" if section in OPTIONS else ""
            mistakes.append(unknown(f"section '{section}'", str(section), SECTIONS) + hint)
            continue
        if content is not None and not isinstance(content, dict):
            mistakes.append(f"section '{section}': expected options, got {content!r}")
            continue
        known = [f.name for f in dataclasses.fields(SECTIONS[section])]
        for name, value in (content or {}).items():
            if name in known:
                values[name] = value
            elif name in OPTIONS:
                mistakes.append(f"'{name}' stands in section '{section}'; it belongs in '{OPTIONS[name]}'")
            else:
                mistakes.append(unknown(f"key '{section}.{name}'", str(name), known))
    return values


def _section(kind: type, values: Mapping[str, Any], mistakes: list[str]) -> Any:
    """One section's dataclass from the values that belong to it; mistakes are appended."""
    hints = typing.get_type_hints(kind)
    arguments = {}
    for f in dataclasses.fields(kind):
        if f.name not in values:
            continue
        try:
            value = convert(values[f.name], hints[f.name])
        except (ValueError, TypeError, KeyError, OverflowError):
            mistakes.append(f"{f.name}: got {values[f.name]!r}, expected {describe_type(hints[f.name])}")
            continue
        choices, check = f.metadata["choices"], f.metadata["check"]
        if value is not None and choices and value not in choices:
            mistakes.append(f"{f.name}: {unknown(repr(value), str(value), choices)}; choices: {', '.join(choices)}")
        elif value is not None and check and (wrong := check(value)):
            mistakes.append(f"{f.name}: got {value}, {wrong}")
        else:
            arguments[f.name] = value
    return kind(**arguments)


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type of an option; strings are read as the command line would have them.

    Raises:
        ValueError, TypeError: it is no such value.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if type(None) in kinds:
            return None
        if value is None or str not in kinds:
            raise ValueError("a value is needed")
    if tuple[float, float] in kinds:
        items = value.split(",") if isinstance(value, str) else value
        return tuple(float(item) for item in items)
    if tuple[str, ...] in kinds:
        if isinstance(value, str):
            return tuple(value.split(",")) if "," in value else value
        return tuple(str(item) for item in value)
    kind = next(kind for kind in kinds if kind is not type(None))
    if kind is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}[str(value).lower()]
    if isinstance(value, bool) or (kind is int and float(value) != int(float(value))):
        raise ValueError("not a number of this kind")
    if kind is int:
        return int(value) if not isinstance(value, str) or value.lstrip("+-").isdigit() else int(float(value))
    number = kind(value)
    if kind is float and not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def describe_type(hint: Any) -> str:
    """A type as a person would call it."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return " or ".join(words.get(kind, "a list") for kind in kinds)


def to_yaml(config: Config) -> str:
    """The resolved configuration as a recipe that `load` reads back to the same."""
    tree = dataclasses.asdict(config)
    return yaml.safe_dump(_plain(tree), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
