"""octavo: a batched GPU serving engine for GPT-2. See README.md for the map of the tree."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.llm import LLM

__all__ = ["LLM", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`octavo.LLM` without loading the engine where only the client is wanted."""
    if name == "LLM":
        return importlib.import_module("octavo.llm").LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
