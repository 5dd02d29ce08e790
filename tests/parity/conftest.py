"""What parity tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity.beams import save_tiny_model


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny model whose beams differ."""
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_model(path)
    return path
