"""The folder of files that configuration tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.config.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A right and complete set of files; tests break one thing."""
    return World(tmp_path)
