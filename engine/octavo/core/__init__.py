"""Scheduling and the block pool: pure Python and numpy, no torch, no gRPC."""
