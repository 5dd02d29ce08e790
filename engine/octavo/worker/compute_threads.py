"""The OpenMP threads of the CPU path: how many there are, and on which cores they run."""

from __future__ import annotations

import torch
from octavo_kernels.cpu.binding import Binding, BindingError

from octavo import cpu_cores
from octavo.config import ModelConfig
from octavo.errors import StartupError


class ComputeThreads:
    """Owned by the engine's runner; `release` when it ends."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        """Raises StartupError (USAGE, DEVICE)."""
        kind = config.device if device.type == "cpu" else device.type
        cores = cpu_cores.resolve(config.cpu_cores, num_threads=config.num_threads, device=kind)
        number = len(cores) or config.num_threads
        if number:
            torch.set_num_threads(number)
        self.cores = cpu_cores.describe(cores)
        """As "0-3,8"; empty if they may run anywhere."""
        try:
            self._binding = Binding(cores) if cores else None
        except BindingError as error:
            raise StartupError(StartupError.DEVICE, f"cpu_cores {config.cpu_cores!r}: {error}") from None

    def release(self) -> None:
        """They may run anywhere again."""
        if self._binding is not None:
            self._binding.release()
            self._binding = None
