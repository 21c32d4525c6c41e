"""What processes on a CPU share: imports and compiled kernels of the server that forks them. It starts no thread."""

import os
from contextlib import suppress

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from transformers.models.llama import modeling_llama  # noqa: F401

from scale_sft.bench import contestants  # noqa: F401
from scale_sft.bench.gpu import checks, child, memory, parts, steps, training  # noqa: F401
from scale_sft.kernels.cpu import compile as native
from scale_sft.training import assemble, checkpoints, inputs, lifecycle  # noqa: F401

with suppress(ImportError):
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

torch.set_num_threads(1)
native.why_not()
