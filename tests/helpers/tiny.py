"""Tiny model folders and clips, built once per test process and shared by every test that only reads them.

A test that changes a file asks for a copy (``copy_to``): the cached folder is the same for all others.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any


@functools.lru_cache(maxsize=1)
def _root(pid: int) -> Path:
    """One temporary folder per process; forked ranks read their parent's."""
    root = Path(tempfile.mkdtemp(prefix=f"tiny-wan-{pid}-"))
    atexit.register(lambda: shutil.rmtree(root, ignore_errors=True) if os.getpid() == pid else None)
    return root


_PID = os.getpid()


@functools.cache
def _cached(kind: str, options: tuple[tuple[str, Any], ...]) -> Path:
    target = _root(_PID) / f"{kind}-{len(list(_root(_PID).iterdir()))}"
    if kind == "pipeline":
        from mindspeed_wan.demo.model_folder import write_model_folder

        return write_model_folder(target, **dict(options))
    if kind == "original":
        from mindspeed_wan.demo.original_folder import write_original_folder

        return write_original_folder(target, **dict(options))
    from mindspeed_wan.demo.clips import write_clips

    write_clips(target, **dict(options))
    return target


def _folder(kind: str, copy_to: str | os.PathLike[str] | None, options: dict[str, Any]) -> Path:
    cached = _cached(kind, tuple(sorted(options.items())))
    if copy_to is None:
        return cached
    target = Path(copy_to) / cached.name
    shutil.copytree(cached, target)
    return target


def tiny_pipeline_folder(
    copy_to: str | os.PathLike[str] | None = None, task: str = "t2v", **options: Any
) -> Path:
    """Return a tiny Diffusers folder (``demo.model_folder.write_model_folder``'s options).

    Args:
        copy_to: a folder of the test (``tmp_path``) to get a private copy that may be changed.
        task: ``t2v``, ``i2v``, ``wan2.1-t2v`` or ``wan2.1-i2v``.
        **options: ``seed``, ``dtype``, ``shard_size`` and the fields of ``TinySizes``.
    """
    return _folder("pipeline", copy_to, {"task": task, **options})


def tiny_original_folder(
    copy_to: str | os.PathLike[str] | None = None, task: str = "t2v", **options: Any
) -> Path:
    """Return the same weights in Wan-AI's own layout."""
    return _folder("original", copy_to, {"task": task, **options})


def tiny_clips(copy_to: str | os.PathLike[str] | None = None, **options: Any) -> Path:
    """Return a folder of real mp4 clips with annotations (``demo.clips.write_clips``'s options)."""
    return _folder("clips", copy_to, options)
