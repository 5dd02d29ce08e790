"""What a front-end knows of the served checkpoint: configuration, tokenizer, and the parameters that it sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from octavo.checkpoint import ModelSpec, read_generation_config, read_spec
from octavo.errors import StartupError
from octavo.frontend.defaults import checkpoint_params, default_params
from octavo.tokenizer import Tokenizer
from octavo.types import GenerationParams


@dataclass(frozen=True, slots=True)
class FrontendModel:
    """A checkpoint without its weights."""

    name: str
    """Name under which it is served."""
    spec: ModelSpec
    tokenizer: Tokenizer
    checkpoint_params: GenerationParams
    """What generation_config.json sets, and nothing else."""
    default_params: GenerationParams
    """What applies when a request sets nothing. The default of 20 new tokens is cut at n_positions."""
    max_model_len: int
    """Longest total length in tokens."""

    @property
    def bos_token_id(self) -> int | None:
        """Token that an empty prompt starts from."""
        return self.checkpoint_params.bos_token_id

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a sequence; empty when the checkpoint names none."""
        return self.checkpoint_params.eos_token_id or []

    @classmethod
    def load(cls, path: Path, name: str, max_model_len: int = 0) -> FrontendModel:
        """Reads config, tokenizer and generation_config.json; max_model_len 0 is n_positions + 1.

        Raises StartupError (CHECKPOINT) naming file and field; USAGE for a max_model_len out of range.
        """
        spec = read_spec(path)
        longest = spec.n_positions + 1
        if not 0 <= max_model_len <= longest or max_model_len == 1:
            raise StartupError(
                StartupError.USAGE, f"max_model_len must be 2 to {longest} (n_positions + 1), not {max_model_len}"
            )
        from_file = checkpoint_params(read_generation_config(path), spec.vocab_size, spec.n_positions)
        return cls(
            name=name,
            spec=spec,
            tokenizer=Tokenizer.load(path, spec.vocab_size),
            checkpoint_params=from_file,
            default_params=default_params(from_file),
            max_model_len=max_model_len or longest,
        )
