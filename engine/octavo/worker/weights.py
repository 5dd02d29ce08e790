"""Reads the weights of a GPT2LMHeadModel checkpoint: safetensors only, every name, shape and type checked.

A folder has `model.safetensors`, or several files and `model.safetensors.index.json`. Names may begin with
"transformer."; the buffers `attn.bias` and `attn.masked_bias` of old checkpoints are ignored. Nothing is unpickled.

Tensors are read one by one, when the model takes them, with plain reads instead of a memory map: at no time is more in
memory than what was taken and one tensor. Each damage is a StartupError (CHECKPOINT) of one line that names file and
tensor.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from octavo.checkpoint import ModelSpec
from octavo.errors import StartupError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
PICKLE_PATTERNS: Final = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
PICKLE_MAGIC: Final = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
"""How a pickle and torch's zip archive of one begin."""
DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
BUFFER: Final = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
HASH_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor is."""

    file: Path
    stored_name: str
    offset: int
    """Bytes from the file's beginning."""
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """A checked checkpoint, ready to be read."""

    tensors: WeightReader
    num_parameters: int
    """Distinct numbers: a tied head counts once."""

    @property
    def sha256(self) -> str:
        """Of the weight files one after the other, by name. Waits for the thread that computes it."""
        return self.tensors.sha256()


def load_weights(
    path: Path,
    spec: ModelSpec,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[str], None] = lambda line: None,
    progress_bar: bool | None = None,
) -> Weights:
    """Opens and checks the weights in folder `path`; they are read when `tensors.pop(name)` takes them.

    progress_bar: on stderr; None: only when stderr is a terminal. Raises StartupError (CHECKPOINT).
    """
    files = _weight_files(path)
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for entry in _read_header(file):
            name = entry.stored_name.removeprefix("transformer.")
            if BUFFER.fullmatch(name):
                continue
            if name in entries:
                raise _error(file, entry.stored_name, f"is also in {entries[name].file.name}")
            entries[name] = entry
    _check_index(path, files, entries)
    _check_table(files[0] if len(files) == 1 else path / INDEX_FILE, spec, entries)
    _tie(spec, entries)
    num_parameters = sum(torch.Size(entry.shape).numel() for entry in entries.values())
    total = sum(entry.num_bytes for entry in entries.values())
    progress(f"weights: {num_parameters:,} parameters in {total / 1e6:,.1f} MB")
    return Weights(WeightReader(files, entries, device, dtype, progress_bar), num_parameters)


class WeightReader:
    """Reads a tensor when it is taken. Has the part of dict's interface that GPT2 uses."""

    def __init__(
        self,
        files: list[Path],
        entries: dict[str, TensorEntry],
        device: torch.device,
        dtype: torch.dtype,
        progress_bar: bool | None,
    ) -> None:
        self._entries = entries
        self._device = device
        self._dtype = dtype
        self._files = {file: _open(file) for file in files}
        total = sum(entry.num_bytes for entry in entries.values())
        disable = None if progress_bar is None else not progress_bar  # None: tqdm asks whether stderr is a terminal
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=disable, leave=False)
        self._digest = ""
        self._hasher = threading.Thread(target=self._hash, args=(files,), name="weights-sha256", daemon=True)
        self._hasher.start()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def pop(self, name: str) -> Tensor:
        """The tensor on the device in the wanted type. The last one closes the files."""
        entry = self._entries.pop(name)
        buffer = torch.empty(entry.num_bytes, dtype=torch.uint8)
        file = self._files[entry.file]
        try:
            file.seek(entry.offset)
            if file.readinto(buffer.numpy().data) != entry.num_bytes:
                raise _error(entry.file, entry.stored_name, "the file ends within it")
        except OSError as error:
            raise _error(entry.file, entry.stored_name, f"cannot be read ({type(error).__name__})") from error
        self._bar.update(entry.num_bytes)
        if not self._entries:
            self.close()
        return buffer.view(entry.dtype).view(entry.shape).to(self._device, self._dtype)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._bar.close()

    def sha256(self) -> str:
        self._hasher.join()
        return self._digest

    def _hash(self, files: list[Path]) -> None:
        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                while chunk := file.read(HASH_CHUNK):
                    digest.update(chunk)
        self._digest = digest.hexdigest()


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of a GPT2LMHeadModel and its shape; linears are Conv1D, [in, out]."""
    embd, inner = spec.n_embd, spec.inner_size
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (spec.vocab_size, embd), "wpe.weight": (spec.n_positions, embd)}
    for layer in range(spec.n_layer):
        for name, shape in (
            ("ln_1", (embd,)),
            ("attn.c_attn", (embd, 3 * embd)),
            ("attn.c_proj", (embd, embd)),
            ("ln_2", (embd,)),
            ("mlp.c_fc", (embd, inner)),
            ("mlp.c_proj", (inner, embd)),
        ):
            shapes[f"h.{layer}.{name}.weight"] = shape
            shapes[f"h.{layer}.{name}.bias"] = shape[-1:]
    shapes["ln_f.weight"] = shapes["ln_f.bias"] = (embd,)
    shapes["lm_head.weight"] = (spec.vocab_size, embd)
    return shapes


def _weight_files(path: Path) -> list[Path]:
    """The files with weights, sorted by name."""
    if (path / SINGLE_FILE).exists():
        return [path / SINGLE_FILE]
    if (path / INDEX_FILE).exists():
        names = sorted(set(_read_index(path).values()))
        for name in names:
            if Path(name).name != name:
                raise _error(path / INDEX_FILE, name, "is not a file of this folder")
            if not (path / name).exists():
                raise _error(path / INDEX_FILE, name, "is missing")
        return [path / name for name in names]
    pickles = sorted(file.name for pattern in PICKLE_PATTERNS for file in path.glob(pattern))
    if pickles:
        raise _error(path / pickles[0], None, "pickle weights refused; save the model with safe_serialization=True")
    raise _error(path / SINGLE_FILE, None, f"missing, and so is {INDEX_FILE}")


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name."""
    try:
        index = json.loads((path / INDEX_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise _error(path / INDEX_FILE, None, f"not readable as JSON ({type(error).__name__})") from error
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise _error(path / INDEX_FILE, None, "has no weight_map of names")
    return names


def _read_header(file: Path) -> list[TensorEntry]:
    """Checks the file as safetensors does, then reads its table."""
    with _open(file) as stream:
        beginning = stream.read(8)
        if beginning.startswith(PICKLE_MAGIC):
            raise _error(file, None, "pickle weights refused; it only has the name of a safetensors file")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            tensor = _first_truncated(stream, beginning)
            reason = "the file ends before it does" if tensor else f"not a valid safetensors file ({_reason(error)})"
            raise _error(file, tensor, reason) from error
        size = int.from_bytes(beginning, "little")
        table = json.loads(stream.read(size))
    return [_entry(file, name, 8 + size, table[name]) for name in table if name != "__metadata__"]


def _entry(file: Path, name: str, start: int, info: dict[str, Any]) -> TensorEntry:
    if info["dtype"] not in DTYPES:
        if BUFFER.fullmatch(name.removeprefix("transformer.")):
            return TensorEntry(file, name, 0, 0, torch.uint8, ())  # a mask of booleans, never read
        raise _error(file, name, f"has type {info['dtype']}, not one of {', '.join(DTYPES)}")
    begin, end = info["data_offsets"]
    return TensorEntry(file, name, start + begin, end - begin, DTYPES[info["dtype"]], tuple(info["shape"]))


def _first_truncated(stream: BufferedReader, beginning: bytes) -> str | None:
    """Name of the first tensor that reaches beyond the file's end, if the table can be read at all."""
    size = int.from_bytes(beginning, "little")
    end_of_file = stream.seek(0, 2)
    if len(beginning) < 8 or 8 + size > end_of_file:
        return None
    stream.seek(8)
    try:
        table = json.loads(stream.read(size))
        ends = {name: info["data_offsets"][1] for name, info in table.items() if name != "__metadata__"}
        beyond = [(end, name) for name, end in ends.items() if 8 + size + end > end_of_file]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return min(beyond)[1] if beyond else None


def _check_index(path: Path, files: list[Path], entries: dict[str, TensorEntry]) -> None:
    """A sharded checkpoint has the tensors of its index, each in the file that the index names."""
    if files[0].name == SINGLE_FILE:
        return
    names = _read_index(path)
    stored = {entry.stored_name: entry.file.name for entry in entries.values()}
    for name, file in names.items():
        if not BUFFER.fullmatch(name.removeprefix("transformer.")) and stored.get(name) != file:
            raise _error(path / file, name, f"missing; {INDEX_FILE} says it is here")
    for name, file in stored.items():
        if name not in names:
            raise _error(path / file, name, f"not in {INDEX_FILE}")


def _check_table(file: Path, spec: ModelSpec, entries: dict[str, TensorEntry]) -> None:
    """Exactly the tensors of the model, each with its shape. `file` is what a missing one is reported of."""
    shapes = expected_shapes(spec)
    for name, entry in entries.items():
        if name not in shapes:
            raise _error(entry.file, entry.stored_name, "does not belong to a GPT2LMHeadModel of this config.json")
        if entry.shape != shapes[name]:
            expected = list(shapes[name])
            raise _error(entry.file, entry.stored_name, f"has shape {list(entry.shape)}, config.json says {expected}")
    optional = {"lm_head.weight", "wte.weight"} if spec.tie_word_embeddings else set()
    for name in shapes:
        if name not in entries and (name not in optional or not optional & entries.keys()):
            raise _error(file, name, "missing")


def _tie(spec: ModelSpec, entries: dict[str, TensorEntry]) -> None:
    """Leaves "lm_head.weight" out where it is the embedding, as transformers does: in a tied model either may be stored
    alone, and two that differ are not tied."""
    if not spec.tie_word_embeddings:
        return
    if "wte.weight" not in entries:
        entries["wte.weight"] = entries.pop("lm_head.weight")
    elif "lm_head.weight" in entries and _same_bytes(entries["wte.weight"], entries["lm_head.weight"]):
        del entries["lm_head.weight"]


def _same_bytes(first: TensorEntry, second: TensorEntry) -> bool:
    if (first.dtype, first.num_bytes) != (second.dtype, second.num_bytes):
        return False
    with _open(first.file) as a, _open(second.file) as b:
        a.seek(first.offset)
        b.seek(second.offset)
        for done in range(0, first.num_bytes, HASH_CHUNK):
            size = min(HASH_CHUNK, first.num_bytes - done)
            if a.read(size) != b.read(size):
                return False
    return True


def _open(file: Path) -> BufferedReader:
    try:
        return file.open("rb")
    except OSError as error:
        raise _error(file, None, f"cannot be read ({type(error).__name__})") from error


def _reason(error: Exception) -> str:
    """safetensors' own word, such as "InvalidHeaderDeserialization"."""
    return str(error).rsplit(": ", 1)[-1].splitlines()[0] if str(error) else type(error).__name__


def _error(file: Path, tensor: str | None, reason: str) -> StartupError:
    return StartupError(StartupError.CHECKPOINT, ": ".join([file.name, *([tensor] if tensor else []), reason]))
