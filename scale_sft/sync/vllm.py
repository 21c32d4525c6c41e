"""vLLM: patches through its sparse weight transfer engine (`vllm.distributed.weight_transfer.sparse_nccl_engine`).

Start the server with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend": "sparse_nccl"}', from the base
that is trained. Then, in the trainer:

    server = VllmServer("http://127.0.0.1:8000")
    server.connect()
    server.send(sync.changed(sparse))

The server's own `load_weights` fuses and cuts the entries (qkv_proj, tensor parallelism). It compares no version and no
digest: one trainer sends to a server from its start to its end, and a restarted trainer needs a restarted server.
Written against vLLM 0.33.0; nothing of vLLM is imported before `connect` or `weight_patches` is called.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import urllib.request
from typing import Any
from urllib.parse import urlencode, urlparse

import torch

from .patches import Patches, SyncError

PAUSE_SECONDS = 300
TESTED = "0.33"


def weight_patches(patches: Patches) -> list[Any]:
    """Make vLLM's `SparseWeightPatch` of each changed weight: its name, int32 indices, values and full shape.

    Raises:
        SyncError: vLLM is missing or has another `SparseWeightPatch`; a weight has 2^31 entries or more (vLLM takes
            int32 indices only); a value is NaN (vLLM marks unchanged entries with it).
    """
    for patch in patches:
        if patch.indices.dtype is not torch.int32:
            raise SyncError(
                f"sync: got '{patch.name}' of {patch.shape[0] * patch.shape[1]:,} entries, vLLM takes int32 indices: "
                "fewer than 2^31. Fix: leave it out of target_modules"
            )
        if bool(patch.values.isnan().any()):
            raise SyncError(f"sync: got a NaN in '{patch.name}', which means `unchanged` to vLLM; expected numbers")
    kind = _patch_class()
    return [
        kind(name=patch.name, indices=patch.indices, values=patch.values, full_shape=patch.shape) for patch in patches
    ]


def _patch_class() -> Any:
    try:
        from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseWeightPatch
    except ImportError as error:
        raise SyncError(
            f"sync: got no SparseWeightPatch from vLLM ({error}), expected vLLM {TESTED}. Fix: pip install vllm"
        ) from None
    fields = [field.name for field in dataclasses.fields(SparseWeightPatch)]
    if fields != ["name", "indices", "values", "full_shape"]:
        raise SyncError(
            f"sync: got a SparseWeightPatch of {fields}, expected that of vLLM {TESTED}, in checkpoint coordinates. "
            f"Fix: pip install 'vllm>={TESTED}'"
        )
    return SparseWeightPatch


class VllmServer:
    """A running vLLM server that takes patches over NCCL, driven through its HTTP routes.

    Args:
        url: of the server.
        address: of this machine, as the server reaches it; None: as the route to the server has it.
        port: for the NCCL group; None: any free one.
        timeout_seconds: of each HTTP request.
    """

    def __init__(
        self, url: str, address: str | None = None, port: int | None = None, timeout_seconds: float = PAUSE_SECONDS
    ):
        self.url, self._address, self._port, self._timeout = url.rstrip("/"), address, port, timeout_seconds
        self._engine: Any = None

    def connect(self) -> None:
        """Open the NCCL group with the server's workers.

        Raises:
            SyncError: vLLM is missing, the server does not answer, or it was started without the sparse engine.
        """
        _patch_class()
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseNCCLTrainerInitInfo

        workers = json.loads(self._request("GET", "get_world_size"))["world_size"]
        address, port = self._endpoint()
        info = SparseNCCLTrainerInitInfo(rank=0, master_address=address, master_port=port, world_size=workers + 1)
        client = HTTPVLLMWeightSyncClient(self.url, timeout=self._timeout)
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=client)

    def send(self, patches: Patches) -> None:
        """Write patches into the server's weights; returns when all its workers have them.

        Raises:
            SyncError: see `weight_patches`; or there is no connection.
        """
        if self._engine is None:
            raise SyncError("send: got no connection to the server, expected one. Fix: call connect() first")
        device = self._engine.model_update_group.device
        self._engine.send_weights(weight_patches(patches.to(device)))

    def pause(self) -> None:
        """Freeze requests in flight, so that no token is computed with half-written weights."""
        self._request("POST", "pause", mode="keep")

    def resume(self) -> None:
        """Continue the requests."""
        self._request("POST", "resume")

    def close(self) -> None:
        """Leave the NCCL group."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def _request(self, method: str, path: str, **query: str) -> bytes:
        url = f"{self.url}/{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=self._timeout) as answer:
                return bytes(answer.read())
        except (OSError, ValueError) as error:
            raise SyncError(
                f"sync: got '{error}' from {url}, expected an answer of vLLM. Fix: start the server with "
                'VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config \'{"backend": "sparse_nccl"}\''
            ) from None

    def _endpoint(self) -> tuple[str, int]:
        """Choose the address and port at which the workers meet this process."""
        host = urlparse(self.url).hostname or "127.0.0.1"
        address = self._address
        if address is None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # a datagram socket sends nothing here
                probe.connect((host, 9))
                address = str(probe.getsockname()[0])
        if self._port is not None:
            return address, self._port
        with socket.socket() as probe:
            probe.bind(("", 0))
            return address, int(probe.getsockname()[1])
