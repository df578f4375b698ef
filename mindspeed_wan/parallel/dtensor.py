"""A local tensor seen as its piece of a global one, wherever it lives, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta


def piece_of(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], *, shape: Sequence[int],
             stride: Sequence[int]) -> DTensor:
    """Return ``local`` as its piece of a tensor of ``shape`` on ``mesh``; storage is shared.

    ``DTensor.from_local`` copies to the mesh's device first, so what is read into the result would never reach a shard
    in host memory (offloaded parameters and optimizer state). FSDP2 makes its own sharded parameters as this does.
    """
    meta = TensorMeta(torch.Size(shape), tuple(stride), local.dtype)
    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=meta)
    return DTensor(local, spec, requires_grad=False)  # type: ignore[no-any-return, call-arg, arg-type]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor (shared storage), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
