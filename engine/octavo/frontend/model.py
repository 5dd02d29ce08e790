"""What a front-end knows of the served checkpoint: configuration, tokenizer, and the parameters that it sets."""

from __future__ import annotations

from pathlib import Path

from octavo.checkpoint import ModelSpec
from octavo.frontend.tokenizer import Tokenizer
from octavo.types import GenerationParams


class FrontendModel:
    """A checkpoint without its weights. Immutable after loading."""

    name: str
    """Name under which it is served."""
    spec: ModelSpec
    tokenizer: Tokenizer
    default_params: GenerationParams
    """Every supported field resolved as if a request had set none, except the lengths that depend on the prompt."""
    bos_token_id: int | None
    """Token that an empty prompt starts from."""
    eos_token_ids: list[int]
    max_model_len: int
    """Longest total length in tokens."""

    @classmethod
    def load(cls, path: Path, name: str, max_model_len: int = 0) -> FrontendModel:
        """Reads config, tokenizer and generation_config.json; max_model_len 0 is n_positions + 1.

        Raises StartupError (CHECKPOINT) naming file and field.
        """
        ...
