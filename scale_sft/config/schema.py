"""JSON Schema of a recipe, made from the dataclasses of `config`, so that editors complete and check YAML."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from .options import SECTIONS

_WORDS = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}


def schema() -> dict[str, Any]:
    """Make the schema (draft 2020-12): one object per section, one property per option, unknown keys refused."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "scale_sft recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _section(kind) for name, kind in SECTIONS.items()},
    }


def _section(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {
        "type": ["object", "null"],
        "description": (kind.__doc__ or "").strip(),
        "additionalProperties": False,
        "properties": {field.name: _option(field, hints[field.name]) for field in dataclasses.fields(kind)},
    }


def _option(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    alternatives = [_type(kind) for kind in kinds]
    found: dict[str, Any] = alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}
    if field.metadata["choices"]:
        found = {"enum": [*field.metadata["choices"], *([None] if type(None) in kinds else [])]}
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return {"description": field.metadata["help"], "default": default, **found}


def _type(kind: Any) -> dict[str, Any]:
    if typing.get_origin(kind) is not tuple:
        return {"type": _WORDS[kind]}
    members = typing.get_args(kind)
    if members[-1] is Ellipsis:
        return {"type": "array", "items": _type(members[0])}
    return {
        "type": "array",
        "prefixItems": [_type(member) for member in members],
        "minItems": len(members),
        "maxItems": len(members),
    }
