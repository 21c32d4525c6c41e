"""YAML without guesses: a value is the text that stands there, and the option that it is for gives it its type.

YAML 1.1 would make a boolean of `off`, 83 of `0123`, 750 of `12:30`, and keep the last of two equal keys.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Reads maps, lists, null and text; refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and lines.setdefault(key.value, line) != line:
                first = lines[key.value]
                raise yaml.YAMLError(f"line {line}: '{key.value}' is given again, first in line {first}; keep one")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    **{first: [(_NULL, re.compile(r"(?:~|null|Null|NULL|)$"))] for first in ("~", "n", "N", "")},
    "<": [(_MERGE, re.compile(r"<<$"))],
}
"""By the first character of a scalar: null and merge keys are all that is recognised."""


def read_yaml(text: str) -> Any:
    """Read a YAML document; every scalar but null is a string.

    Raises:
        yaml.YAMLError: it is not YAML, or gives a key twice; names the line.
    """
    return yaml.load(text, Loader=_Loader)  # a SafeLoader
