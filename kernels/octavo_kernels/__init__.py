"""Triton kernels of octavo and their torch specification (`reference`). Knows nothing of the engine."""
