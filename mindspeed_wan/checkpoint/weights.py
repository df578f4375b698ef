"""Model weights from any known folder into a sharded model: strict, and each rank reads only its own slices."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_wan.checkpoint.manifest import MANIFEST_NAME, verify_manifest
from mindspeed_wan.checkpoint.sources import Found, check_expert, check_names_and_shapes, find, open_weights
from mindspeed_wan.checkpoint.stored import QuantizedTarget, copy_into
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.param_map import parameter_table
from mindspeed_wan.parallel.agreement import all_or_none, first_decides

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LoadReport:
    """What was loaded from where, how many bytes this rank read, and how long that took."""

    found: Found
    bytes_read: int
    seconds: float


def load_model_weights(path: str | Path, views: Mapping[str, Tensor | QuantizedTarget], config: WanConfig, *,
                       expert: str | None = None, step: int | None = None, full_hash: bool = False) -> LoadReport:
    """Load the weights at ``path`` into ``views``, in place, cast to the model's dtypes. Collective.

    Args:
        path: a Diffusers or original expert folder, a checkpoint root or folder (DCP or mp_rank), or a file.
        views: MM parameter name -> global view of the local storage (``models.wan.views.global_views``), or a weight
            to quantise (``models.quantization.weight_views``).
        config: the model's architecture; the weights must hold exactly its parameters.
        expert: the expert that is to be trained or run; weights known to be the other one are refused.
        step: iteration of a checkpoint root, instead of the one its tracker names.
        full_hash: check SHA-256 as well where the folder has a manifest.

    Raises:
        CheckpointError: on every rank, when the weights are missing, damaged or of another model.
    """
    started = time.perf_counter()
    found = first_decides(lambda: checked(find(path, step=step), full_hash=full_hash))
    check_expert(found, expert)
    bytes_read = all_or_none(lambda: read_weights(found, views, config))
    return LoadReport(found, bytes_read, time.perf_counter() - started)


def checked(found: Found, *, full_hash: bool = False) -> Found:
    """Verify the files of ``found`` against its manifest, where it has one, and return it."""
    if (found.path / MANIFEST_NAME).is_file():
        verify_manifest(found.path, full=full_hash)
    return found


def read_weights(found: Found, views: Mapping[str, Tensor | QuantizedTarget], config: WanConfig) -> int:
    """Read this rank's slices of every parameter of ``config`` into ``views``; returns the bytes read. Not collective.

    ``views`` may hold further entries (adapters); they are left alone. Parameters without a view belong to another
    pipeline stage.
    """
    wanted = {param.mm: param.shape for param in parameter_table(config)}
    with open_weights(found, config) as files:
        check_names_and_shapes(files, wanted, config)
        copy_into(files, {name: views[name] for name in wanted if name in views})
        return files.bytes_read
