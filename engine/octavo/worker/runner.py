"""Which runner computes an engine's steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from octavo.config import EngineConfig
from octavo.worker.device import choose_device, uses_kernels
from octavo.worker.model_runner import ModelRunner

if TYPE_CHECKING:
    from octavo.worker.device_runner import DeviceRunner


def load_runner(config: EngineConfig, progress: Callable[[str], None]) -> ModelRunner | DeviceRunner:
    """The runner of the configured device, with its model loaded. Raises StartupError.

    Args:
        progress: told of each stage, one line for people.
    """
    if not uses_kernels(config.model.device, choose_device(config.model.device)):
        return ModelRunner(config, progress)
    from octavo.worker.device_runner import DeviceRunner  # with it Triton, which a CPU engine does without

    return DeviceRunner(config, progress)
