"""Shared test set-up: one thread per process (ranks share two cores), no network, quiet libraries."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MINDSPEED_WAN_DEVICE", "cpu")
settings.register_profile("no deadline", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("no deadline")

_CORE = ("unit/models", "unit/parallel", "unit/diffusion", "unit/platforms", "unit/checkpoint", "unit/training",
         "unit/config", "unit/lora", "distributed", "converters")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what must also run on the oldest supported torch and megatron-core (``make test-oldest``)."""
    root = Path(__file__).parent
    for item in items:
        if item.path.relative_to(root).as_posix().startswith(_CORE):
            item.add_marker(pytest.mark.core)
