"""What the server that forks the runs imports once, instead of every run anew. Nothing here may start a thread."""

import accelerate  # noqa: F401
import datasets  # noqa: F401
import deepspeed  # noqa: F401
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

from scale_sft import train  # noqa: F401
from scale_sft.distributed import cluster as distributed  # noqa: F401
from scale_sft.training import assemble, inputs, run_folder, session  # noqa: F401

torch.set_num_threads(1)
