"""What the server that forks processes has ready for all of them (tests/forked.py). Nothing here may start a thread."""

import os

os.environ |= {"TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}  # before any library reads them

import accelerate  # noqa: F401
import datasets  # noqa: F401
import deepspeed  # noqa: F401
import numpy.ctypeslib  # noqa: F401
import rich._emoji_codes  # noqa: F401
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

from scale_sft import train  # noqa: F401
from scale_sft.distributed import cluster, exit  # noqa: F401
from scale_sft.kernels.cpu import compile as kernels
from scale_sft.training import assemble, checkpoints, inputs, lifecycle, run_folder, session  # noqa: F401

torch.set_num_threads(1)
kernels.why_not()  # compiles them: a second that every process would spend again
