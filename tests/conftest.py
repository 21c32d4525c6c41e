"""What tests share: tiny models of four architectures, tiny data, and ways of running the trainer.

Everything is given by fixtures, most of them functions:

    tiny_model("llama")            folder of a random model: llama, gpt2, opt or qwen2 (float32, or "bfloat16")
    pairs_file, messages_file      two dozen examples: prompt/completion, and conversations
    preferences_file, marked_file  two dozen pairs of answers, and answers marked as good or bad
    train_run(steps=3, ...)        a run in this process with tiny defaults; returns its folder, raises UserError
    session(method="ma", ...)      the same run just before its first step: model, deltas, schedules
    train_cli("--steps", "3")      the training command in this process; result with exit_code, stdout, stderr
    run_cli("--steps", "3")        the training command as a process of its own; returncode, stdout, stderr
    shared("traces/ag.safetensors")  a file that lies beside the project; skips the test where there is none

    c_kernels                      skips the test where there is no compiler for the kernels for CPUs
    set_threads(2)                 torch.set_num_threads, until the test ends

Nothing needs the network, and nothing is written outside temporary folders.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
_HF_HOME = tempfile.mkdtemp(prefix="scale-sft-tests-")
os.environ |= {  # before any library reads them
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": _HF_HOME,
    "HF_DATASETS_CACHE": f"{_HF_HOME}/datasets",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
    os.environ.pop(_name, None)

ARCHITECTURES = ("llama", "gpt2", "opt", "qwen2")
VOCABULARY = 259  # all bytes and three special tokens
CHAT_TEMPLATE = (
    "{% for turn in messages %}<s>{{ turn['role'] }}:{{ turn['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


MARKED_TIMEOUT_SECONDS = 600


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole fast part in parallel workers; chosen tests, and `pytest -n 0`, in this process."""
    options, chosen = config.option, config.args_source is pytest.Config.ArgsSource.ARGS
    fast = options.markexpr in config.getini("addopts") and not options.keyword
    parallel = config.pluginmanager.hasplugin("xdist") and "PYTEST_XDIST_WORKER" not in os.environ
    if parallel and fast and not (chosen or options.collectonly or options.usepdb) and options.numprocesses is None:
        options.numprocesses, options.dist = min(4, os.cpu_count() or 1), "worksteal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests with a marker of their own more time, and run the slow ones first: parallel workers end together."""
    for item in items:
        marked = {mark.name for mark in item.iter_markers()} & {"slow", "quantized", "distributed", "slurm", "hardware"}
        if marked and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(MARKED_TIMEOUT_SECONDS))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `--dist loadfile`, tests that need Slurm stay together too: all of their files share one Slurm."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneSlurm(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)

    return OneSlurm(config, log)


def pytest_unconfigure() -> None:
    """Remove what the libraries have cached."""
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same device on every machine: this process sees a GPU only in tests that are marked so."""
    if request.node.get_closest_marker("gpu") is None:
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def c_kernels() -> None:
    """The kernels for CPUs; skips the test where they cannot be had."""
    from scale_sft.kernels.cpu import compile as native

    if reason := native.why_not():
        pytest.skip(reason)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone at the end of the test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each of the architectures in turn."""
    return request.param


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level tokenizer with a chat template: ids 0 to 255 are bytes; its own call puts <s> in front."""
    from tokenizers import processors

    from scale_sft.model_check.tiny import byte_tokenizer

    made = byte_tokenizer()
    start = ("<s>", made.bos_token_id)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    made.chat_template = CHAT_TEMPLATE
    return made


def tiny_config(architecture: str) -> Any:
    """Two layers of width 32; grouped-query attention (llama, qwen2), biases (all but llama), tied embeddings (all
    but llama), transposed weights (gpt2)."""
    from transformers import GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

    common = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    grouped = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
    }  # fmt: skip
    if architecture == "llama":
        return LlamaConfig(**common, **grouped, tie_word_embeddings=False)
    if architecture == "qwen2":
        return Qwen2Config(**common, **grouped, tie_word_embeddings=True)
    if architecture == "gpt2":
        return GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1)
    return OPTConfig(
        **common, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
        word_embed_proj_dim=32, init_std=0.1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., Path]:
    """(architecture, dtype="float32") -> folder of a random model with its tokenizer; made once per session."""
    made: dict[tuple[str, str], Path] = {}

    def get(architecture: str = "llama", dtype: str = "float32") -> Path:
        if (architecture, dtype) not in made:
            import torch
            from transformers import AutoModelForCausalLM

            folder = tmp_path_factory.mktemp(f"{architecture}-{dtype}")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(tiny_config(architecture))
                for name, parameter in model.named_parameters():  # biases of a fresh model are zero: nothing to test
                    if name.endswith("bias"):
                        torch.nn.init.normal_(parameter, std=0.1)
            model.to(getattr(torch, dtype)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[architecture, dtype] = folder
        return made[architecture, dtype]

    return get


def _write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 sums as prompt and completion, of different lengths."""
    rows = [{"prompt": f"{n} + {n * n} = ", "completion": str(n + n * n)} for n in range(24)]
    return _write_lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def messages_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 conversations of one or two questions and answers."""
    ask = lambda n: [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n + 1)}]
    rows = [{"messages": ask(n) + (ask(n + 1) if n % 2 else [])} for n in range(24)]
    return _write_lines(tmp_path_factory.mktemp("messages") / "messages.jsonl", rows)


@pytest.fixture(scope="session")
def preferences_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs: a sum, and one that is wrong by some; the sides have different lengths."""
    rows = [
        {"prompt": f"{n} + {n * n} = ", "chosen": str(n + n * n), "rejected": f"about {n * n - 1}"[: 4 + n % 7]}
        for n in range(24)
    ]
    return _write_lines(tmp_path_factory.mktemp("preferences") / "preferences.jsonl", rows)


@pytest.fixture(scope="session")
def marked_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 sums as prompt and completion, marked as right or wrong: two are wrong for each that is right."""
    rows = [{"prompt": f"{n} + 1 = ", "completion": str(n + 1 + n % 3), "label": n % 3 == 0} for n in range(24)]
    return _write_lines(tmp_path_factory.mktemp("marked") / "marked.jsonl", rows)


@pytest.fixture
def run_options(tiny_model: Callable[..., Path], pairs_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a run of a few seconds: 6 steps of 4 sequences, reallocation at steps 2, 4 and 6."""
    return {
        "base": str(tiny_model("llama")), "train_data": str(pairs_file), "output_dir": str(tmp_path / "run"),
        "method": "ag", "density": 0.05, "steps": 6, "global_batch_size": 4, "update_interval_steps": 2,
        "estimation_steps": 2, "learning_rate": 0.01, "max_length": 32, "base_placement": "replicate",
    }  # fmt: skip


@pytest.fixture
def train_run(run_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """(option=value, ...) -> the folder of a finished run in this process, without its report (which takes longer than
    the run); raises UserError as the trainer does."""

    def run(**options: Any) -> Path:
        from scale_sft.config.loading import load
        from scale_sft.train import run_training
        from scale_sft.training import lifecycle as outcome

        monkeypatch.setattr(outcome, "write_report", lambda folder: folder / "report.html")
        config = load(None, {**run_options, **options})
        run_training(config)
        return Path(config.run.output_dir)

    return run


@pytest.fixture
def session(run_options: dict[str, Any]) -> Iterator[Callable[..., Any]]:
    """(option=value, ...) -> an assembled `Session` in this process, ready for its first step; no files."""
    clusters = []

    def assemble_one(**options: Any) -> Any:
        from scale_sft.config.loading import load
        from scale_sft.distributed.cluster import Cluster
        from scale_sft.training import assemble
        from scale_sft.training.inputs import read_inputs

        inputs = read_inputs(load(None, {**run_options, **options}))
        clusters.append(Cluster.start(sharded=inputs.placement.sharded, dtype=inputs.dtype))
        return assemble.assemble(inputs, clusters[-1])

    yield assemble_one
    for cluster in clusters:
        cluster.close()


@pytest.fixture
def train_cli() -> Callable[..., Any]:
    """(argument, ...) -> click's result of the training command in this process; nothing but what is given."""

    def run(*arguments: Any) -> Any:
        from click.testing import CliRunner

        from scale_sft.train import main

        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """(argument, ..., timeout_seconds=300) -> scale_sft/train.py in a process of its own, in an empty folder."""

    def run(*arguments: Any, timeout_seconds: float = 300) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "scale_sft" / "train.py"), *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout_seconds, check=False
        )

    return run


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """(relative path) -> that file in the folder `shared` beside the project; skips the test where it is missing."""

    def find(relative: str) -> Path:
        path = ROOT.parent / "shared" / relative
        if not path.exists():
            pytest.skip(f"needs ../shared/{relative}, which is not here")
        return path

    return find
