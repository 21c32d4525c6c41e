"""What tests of data share: files, and examples read from them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scale_sft.config.options import DataConfig
from scale_sft.data.cache import load_examples
from scale_sft.data.examples import Examples
from scale_sft.model.loss import IGNORED

TOOLS = (
    "{% if loud %}!{% endif %}"
    "{% if tools %}<s>tools:{{ tools | tojson }}</s>{% endif %}"
    "{% for turn in messages %}<s>{{ turn['role'] }}:{{ turn['content'] or '' }}"
    "{% for call in turn.tool_calls or [] %}{{ call | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@pytest.fixture
def read(tokenizer, tmp_path) -> Callable[..., Examples]:
    """(path or source, tokenizer=, option=value, ...) -> examples."""

    def get(source: Any, made: Any = None, limit: int | None = None, **options: Any) -> Examples:
        config = DataConfig(**{"max_length": 1000, "cache_dir": str(tmp_path / "cache"), **options})
        source = source if isinstance(source, list) else str(source)
        return load_examples(source, "train", made or tokenizer, config, limit)

    return get


@pytest.fixture
def put(tmp_path) -> Callable[..., Path]:
    """(name, rows, text or bytes) -> the path of a new file of them."""

    def write(name: str, content: list | str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture(scope="session")
def texts() -> Callable[..., list[str]]:
    """(examples, tokenizer) -> every example as text."""
    return lambda examples, tokenizer: [tokenizer.decode(examples.tokens(n)[0]) for n in range(len(examples))]


@pytest.fixture(scope="session")
def counted() -> Callable[..., str]:
    """(examples, tokenizer, n=0) -> the text of the tokens of an example that count."""

    def get(examples: Examples, tokenizer: Any, n: int = 0) -> str:
        ids, labels = examples.tokens(n)
        return tokenizer.decode(ids[labels != IGNORED])

    return get


@pytest.fixture
def with_tools(tokenizer) -> Any:
    """A tokenizer whose chat template writes tools and calls of them, and `!` where a row sets `loud`."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = TOOLS
    return made
