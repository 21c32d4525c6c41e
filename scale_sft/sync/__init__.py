"""Sparse weight sync: a trainer ships to its rollout servers only the entries that changed.

    from scale_sft import sync

    patches = sync.changed(sparse)               # trainer: what differs from the last version that was composed
    data = patches.to_bytes()                    # safetensors

    sync.apply(model, data)                      # receiver: proves that they follow on what it holds, then writes
    sync.apply(model, sync.full(sparse))         # a receiver that restarted, or missed something

patches  `Patches`, their bytes, `SyncError`
compose  `changed` and `full`: the trainer's side
receive  `apply`, `version`, `verify`, `forget`: the receiver's side
source   what a trained model gives, and `SparseModel` as such
peft     PEFT models as such
names    weights' names in the checkpoint's files
places   where a running model keeps the checkpoint's weights: as they are, or fused and cut by `load_weights`
vllm     send to vLLM's sparse weight transfer engine
sglang   the loader for SGLang's --custom-weight-loader, and how to send to it
trl      the weight transfer of TRL's AsyncGRPOTrainer
"""

from . import peft as _peft  # noqa: F401 - registers a kind of model
from .compose import changed as changed
from .compose import full as full
from .patches import Patches as Patches
from .patches import Snapshot as Snapshot
from .patches import SyncError as SyncError
from .patches import WeightPatch as WeightPatch
from .receive import apply as apply
from .receive import forget as forget
from .receive import verify as verify
from .receive import version as version
