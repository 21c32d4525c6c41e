"""Load a configuration: a YAML recipe, then the options that win over it; report all mistakes together."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .methods import with_method
from .options import OPTIONS, SECTIONS, Config, ConfigError, SparseConfig
from .plain_yaml import read_yaml
from .recipes import path_of
from .rules import broken_rules
from .spelling import unknown


def load(recipe: str | Path | Config | None, overrides: Mapping[str, Any]) -> Config:
    """Read the configuration of a recipe (YAML); options win over it.

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
        mistakes += broken_rules(config)
    _refuse(mistakes, recipe)
    return config


def load_sections(recipe: str | Path | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Read the sections of a configuration by name, for commands that need only some; they need not make up a run.

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
    """Read all sections of a recipe; options win over it, mistakes are appended."""
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
    values = with_method(values, SparseConfig.method)
    return {section: _section(kind, values, mistakes) for section, kind in SECTIONS.items()}


def _read_recipe(recipe: str | Path, mistakes: list[str]) -> dict[str, Any]:
    """Read the option values of a YAML file, flattened over its sections."""
    try:
        tree = read_yaml(path_of(recipe).read_text(encoding="utf-8")) or {}
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
    """Make one section's dataclass from the values that belong to it; mistakes are appended."""
    hints = typing.get_type_hints(kind)
    arguments = {}
    for f in dataclasses.fields(kind):
        if f.name not in values:
            continue
        try:
            given = values[f.name]
            if isinstance(given, bool) and "true" in f.metadata["choices"]:  # YAML's, next to auto
                given = str(given).lower()
            value = convert(given, hints[f.name])
        except (ValueError, TypeError, KeyError, OverflowError):
            empty = values[f.name] in ([], ())
            expected = "at least one item" if empty else describe_type(hints[f.name])
            mistakes.append(f"{f.name}: got {values[f.name]!r}, expected {expected}")
            continue
        if value is not None and (wrong := _wrong_with(f, value)):
            mistakes.append(f"{f.name}: {wrong}")
            continue
        arguments[f.name] = _expanded(value) if f.metadata["path"] else value
    return kind(**arguments)


def _wrong_with(f: dataclasses.Field, value: Any) -> str | None:
    """Say what is wrong with an option's value, if anything."""
    choices, check = f.metadata["choices"], f.metadata["check"]
    if choices and value not in choices:
        told, listed = unknown(repr(value), str(value), choices), ", ".join(choices)
        return told if listed in told else f"{told} Known: {listed}"
    if check and (wrong := check(value)):
        return f"got {value}, {wrong}"
    if f.metadata["path"]:
        paths = value if isinstance(value, tuple) else (value,)
        return next((wrong for wrong in map(_wrong_with_path, paths) if wrong), None)
    return None


def _expanded(value: Any) -> Any:
    """Expand `~` and environment variables in a path, or in each of several; leave a source's `?key=value` as it is."""
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    if value is None:
        return None
    path, mark, details = value.partition("?")
    return os.path.expanduser(path if os.path.exists(path) else os.path.expandvars(path)) + mark + details


def _wrong_with_path(text: str) -> str | None:
    """Refuse what does not expand: it would become a folder of that name."""
    path = _expanded(text).partition("?")[0]
    if path.startswith("~"):
        return f"got {text!r}, but this machine has no user {path.split('/')[0][1:]!r}"
    if not os.path.exists(path) and (unset := re.search(r"\$(?:\{(\w+)\}|(\w+))", path)):
        return f"got {text!r}, but the environment variable {unset[1] or unset[2]} is not set"
    return None


def convert(value: Any, hint: Any) -> Any:
    """Turn a value into the type of an option; strings are read as the command line would have them.

    Raises:
        ValueError, TypeError, KeyError: it cannot be such a value.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if type(None) in kinds:
            return None
        if value is None or str not in kinds:
            raise ValueError("a value is needed")
    if tuple[float, float] in kinds:
        return tuple(map(float, _items(value)))
    if tuple[str, ...] in kinds:
        items = _items(value)
        return items[0] if isinstance(value, str) and len(items) == 1 else items
    kind = next(kind for kind in kinds if kind is not type(None))
    if kind is bool:
        return value if isinstance(value, bool) else _BOOLEANS[str(value).lower()]
    if isinstance(value, bool):
        raise ValueError("a boolean is not such a value")
    if kind is str:
        return _text(value)
    if kind is int:
        if isinstance(value, str) and value.lstrip("+-").isdigit():
            return int(value)
        if float(value) != int(float(value)):
            raise ValueError("not a whole number")
        return int(float(value)) if isinstance(value, str) else int(value)
    number = kind(value)
    if kind is float and not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


_BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
_COMMA = re.compile(r",(?![^{}]*\})(?![^\[\]]*\])")
"""Between two values; not the one in a pattern's `{1,2}` or `[a,b]`."""


def _items(value: Any) -> tuple[str, ...]:
    """Split a text at its commas, or take a list as it is; at least one item.

    Raises:
        ValueError, TypeError: nothing there, or something other than text and numbers.
    """
    if isinstance(value, str):
        items = tuple(item.strip() for item in _COMMA.split(value) if item.strip())
    elif isinstance(value, (list, tuple)):
        items = tuple(map(_text, value))
    else:
        raise TypeError("not a list")
    if not items:
        raise ValueError("an empty list")
    return items


def _text(value: Any) -> str:
    """Take a text, a number or a path as text.

    Raises:
        TypeError, ValueError: it is something else, or blank.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float, os.PathLike)):
        raise TypeError("not text")
    if not str(value).strip():
        raise ValueError("blank")
    return str(value)


def describe_type(hint: Any) -> str:
    """Name a type as a person would."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return " or ".join(words.get(kind, "a list") for kind in kinds)


def to_yaml(config: Config) -> str:
    """Write the resolved configuration as a recipe that `load` reads back to the same."""
    tree = dataclasses.asdict(config)
    return yaml.safe_dump(_plain(tree), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
