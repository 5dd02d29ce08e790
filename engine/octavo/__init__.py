"""octavo: a batched GPU serving engine for GPT-2. See README.md for the map of the tree."""

__version__ = "0.1.0"
