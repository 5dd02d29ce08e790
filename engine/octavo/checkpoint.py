"""A checkpoint's folder without torch: where it is, what its config.json and generation_config.json say.

The weights themselves are read by `worker/weights.py`; front-ends need only what is here and the tokenizer.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from octavo.errors import StartupError

DEMO = "demo"
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
TEXT_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
]


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a GPT2LMHeadModel's config.json, with GPT2Config's defaults."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    dtype: str | None = None
    torch_dtype: str | None = None
    """`dtype`'s name before transformers 5."""

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner_size(self) -> int:
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd


def resolve(model: str) -> Path:
    """The local folder of `model`: "demo", a folder, or a hub id (downloaded, safetensors only).

    Raises StartupError (CHECKPOINT) when there is no such folder and the hub has or answers nothing.
    """
    if model == DEMO:
        return Path(str(resources.files("octavo") / "models" / DEMO))
    if Path(model).is_dir():
        return Path(model)
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise StartupError(StartupError.CHECKPOINT, f"{model}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=WEIGHT_FILES + TEXT_FILES))
    except Exception as error:
        raise StartupError(
            StartupError.CHECKPOINT,
            f"{model}: neither a folder here nor a model that the hub could give ({type(error).__name__})",
        ) from error


def read_spec(path: Path) -> ModelSpec:
    """Reads and checks config.json. Raises StartupError (CHECKPOINT) naming file and field."""
    raw = _read_json(path / "config.json", required=True)
    architectures = raw.get("architectures") or ["GPT2LMHeadModel"]
    if raw.get("model_type", "gpt2") != "gpt2" or "GPT2LMHeadModel" not in architectures:
        raise StartupError(
            StartupError.CHECKPOINT,
            f"config.json: octavo serves GPT2LMHeadModel, this is {raw.get('model_type')} {architectures}",
        )
    try:
        spec = msgspec.convert(raw, ModelSpec)
    except msgspec.ValidationError as error:
        raise StartupError(StartupError.CHECKPOINT, f"config.json: {error}") from error
    if min(spec.vocab_size, spec.n_positions, spec.n_embd, spec.n_layer, spec.n_head) < 1 or spec.n_embd % spec.n_head:
        raise StartupError(StartupError.CHECKPOINT, "config.json: sizes must be positive and n_head must divide n_embd")
    return spec


def read_generation_config(path: Path) -> dict[str, Any]:
    """generation_config.json as it is, or what transformers derives from config.json when there is none.

    Values that are null are left out: inside a GenerationConfig None means unset.
    """
    raw = _read_json(path / "generation_config.json", required=False)
    if raw is None:
        model_config = _read_json(path / "config.json", required=True) or {}
        raw = {
            name: model_config[name]
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
            if name in model_config
        }
    return {name: value for name, value in raw.items() if value is not None and not name.startswith("_")}


def _read_json(path: Path, required: bool) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        if not required:
            return None
        raise StartupError(StartupError.CHECKPOINT, f"{path.name}: missing in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise StartupError(
            StartupError.CHECKPOINT, f"{path.name}: not readable as JSON ({type(error).__name__})"
        ) from error
    if not isinstance(value, dict):
        raise StartupError(StartupError.CHECKPOINT, f"{path.name}: not a JSON object")
    return value
