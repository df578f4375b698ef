"""A checkpoint written while training goes on: copy now, write and hash in the background, commit when all are done.

torch's ``async_save`` copies the state to host memory before it returns and writes it in a thread of its own, with
collectives on a process group that nobody else uses. The folder becomes a checkpoint only in ``finish``, which all
ranks call together once each of them has written and hashed its part, so the tracker never names bytes that are not
on disk.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_wan.checkpoint import dcp
from mindspeed_wan.checkpoint.manifest import FileRecord
from mindspeed_wan.errors import ResourceError, WanError
from mindspeed_wan.parallel.agreement import all_or_none, first_decides


def background_group() -> dist.ProcessGroup | None:
    """Create the gloo group that background saves talk over. Collective; once per job."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo")


class BackgroundSave:
    """One save in flight. Collective to create; the state is copied before the constructor returns.

    Args:
        root: the save folder.
        state: key -> global view of the live tensors.
        record: progress, card and retention.
        group: from :func:`background_group`.
    """

    def __init__(self, root: str | Path, state: Mapping[str, Tensor], record: dcp.Record,
                 group: dist.ProcessGroup | None) -> None:
        import torch.distributed.checkpoint as torch_dcp

        self._record, self._final = record, dcp.final_folder(root, record)
        self._staging = first_decides(lambda: dcp.open_staging(self._final))
        self._records: dict[str, FileRecord] = {}
        self._failure: WanError | None = None
        copy = {key: _snapshot(tensor) for key, tensor in state.items()}
        self._future: Any = torch_dcp.async_save(copy, storage_writer=dcp.writer(self._staging), process_group=group)
        self._thread = threading.Thread(target=self._write_and_hash, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """True when this rank has nothing left to write."""
        return not self._thread.is_alive()

    def done_everywhere(self) -> bool:
        """True when no rank has anything left to write. Collective."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.done
        flag = torch.tensor([int(self.done)])
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())

    def finish(self) -> Path:
        """Wait for this rank's part, then commit the folder and move the tracker. Collective.

        Raises:
            ResourceError: on every rank, when any could not write; the folder does not become a checkpoint.
        """
        self._thread.join()
        records = dcp.gather_records(all_or_none(self._outcome))
        first_decides(lambda: dcp.commit(self._staging, self._final, records, self._record))
        return self._final

    def _outcome(self) -> dict[str, FileRecord]:
        if self._failure is not None:
            raise self._failure
        return self._records

    def _write_and_hash(self) -> None:
        try:
            with dcp.write_errors(self._staging):
                self._future.result()
            self._records = dcp.hash_own_files(self._staging)
        except WanError as error:
            self._failure = error
        except Exception as error:  # a thread's exception would vanish; finish() raises it instead
            self._failure = ResourceError(f"the background save failed ({error})", where=str(self._staging))


def _snapshot(tensor: Tensor) -> Tensor:
    """Copy host tensors: ``async_save`` copies from devices, but takes host memory as it is."""
    from torch.distributed.tensor import DTensor

    if tensor.device.type != "cpu":
        return tensor
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    return dcp.view_like(tensor, tensor.to_local().detach().clone())
