"""Writing one safetensors file: whole or absent, with the mode that the umask asks for.

safetensors' own writer leaves a part of the file on a full disk, wraps the disk's errors in a type of its own, and
makes files that only their owner can read, which a group that shares a folder cannot use.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_wan.checkpoint.manifest import disk_error, fsync_folder

if TYPE_CHECKING:
    from torch import Tensor

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def write_tensor_file(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` to ``path``; what was there before stays until the new file is whole and flushed.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    staging = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.touch()
        mode = stat.S_IMODE(staging.stat().st_mode)  # what the umask leaves of 0666
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(staging), dict(metadata))
        staging.chmod(mode)
        _flush(staging)
        os.replace(staging, path)
    except OSError as error:
        raise disk_error(error, path) from None
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise disk_error(OSError(number, os.strerror(number)), path) from None
    finally:
        with contextlib.suppress(OSError):
            staging.unlink()
    fsync_folder(path.parent)


def _flush(path: Path) -> None:
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())
