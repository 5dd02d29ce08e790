"""The CPU's C kernels: compiled once, safely kept, done without where they cannot be had; their products and bits."""

from __future__ import annotations

import itertools
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from octavo.llm import LLM
from octavo_kernels import reference
from octavo_kernels.activations import ACTIVATIONS
from octavo_kernels.checks import FP8
from octavo_kernels.cpu import argmax, linear, native, native_attention
from octavo_kernels.cpu.linear import LinearKind, NativeLinear, OnednnLinear
from octavo_kernels.cpu.native_attention import NativeAttention

needs_kernels = pytest.mark.skipif(native.library() is None, reason=f"no C kernels: {native.why_not()}")
needs_bf16 = pytest.mark.skipif(
    native.library() is None or not native.loaded().octavo_has_linear(), reason="no AVX512_BF16"
)

PROMPTS = ["I met a traveller from an antique land, who said", "Once upon a time", "It was the best of times, " * 9]


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What the compiler was asked for; a copy of the kernels in use comes at once."""
    asked: list[Path] = []

    def compile_at_once(compiler: list[str], output: Path) -> None:
        asked.append(output)
        shutil.copy(native.loaded()._name, output)

    native.library()
    monkeypatch.setattr(native, "_compile", compile_at_once)
    return asked


@needs_kernels
def test_a_second_build_finds_the_first(tmp_path: Path, compilations: list[Path]) -> None:
    path = Path(native._obtain([tmp_path])._name)
    assert native._obtain([tmp_path])._name == str(path)
    assert len(compilations) == 1
    assert os.listdir(tmp_path) == [path.name]


@needs_kernels
@pytest.mark.parametrize("left", [0, 5000])
def test_a_damaged_library_is_made_anew(left: int, tmp_path: Path, compilations: list[Path]) -> None:
    path = Path(native._obtain([tmp_path])._name)
    content = path.read_bytes()
    path.unlink()  # it is loaded
    path.write_bytes(content[:left])
    path.chmod(0o700)
    assert native._obtain([tmp_path])._name == str(path)
    assert len(compilations) == 2
    assert native._is_whole(path)
    assert os.listdir(tmp_path) == [path.name]


@needs_kernels
@pytest.mark.parametrize("writable", ["folder", "file"])
def test_what_others_may_write_is_not_loaded(writable: str, tmp_path: Path, compilations: list[Path]) -> None:
    path = Path(native._obtain([tmp_path])._name)
    (tmp_path if writable == "folder" else path).chmod(0o777)
    used = Path(native._obtain([tmp_path])._name)
    assert len(compilations) == 2
    if writable == "folder":
        assert used.parent != tmp_path and not used.exists()
    else:
        assert used == path and path.stat().st_mode & 0o777 == 0o700


@needs_kernels
def test_where_nothing_can_be_kept_kernels_are_had_nevertheless(compilations: list[Path]) -> None:
    assert not os.path.exists(native._obtain([Path("/proc/none"), Path("/dev/null")])._name)
    assert len(compilations) == 1


def test_there_may_be_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OCTAVO_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert [place.name for place in native._folders()] == [f"octavo-{os.getuid()}"]


@needs_kernels
def test_threads_are_those_of_torch() -> None:
    maps = Path("/proc/self/maps").read_text().splitlines()
    found = {line.split()[-1] for line in maps if re.search(r"/lib(gomp|omp|iomp5)\b[^/]*$", line)}
    assert len(found) == 1


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)


PRINT_KINDS = (
    "import torch\nfrom octavo_kernels.cpu import linear, native\n"
    "print(native.library(), native.why_not(), linear.choose_kind(torch.bfloat16, None))"
)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"OCTAVO_NATIVE": "0"}, "OCTAVO_NATIVE=0"),
        ({"CC": "no-such-compiler"}, "no-such-compiler not found"),
        ({"CC": "false"}, "false failed"),
    ],
)
def test_without_a_compiler_torch_does_it(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    done = python(PRINT_KINDS, OCTAVO_CACHE_DIR=str(tmp_path), **environment)
    assert done.stdout.startswith("None") and reason in done.stdout
    assert LinearKind.NATIVE not in done.stdout


@needs_bf16
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 48, 2), (3, 97, 64), (8, 16, 768), (29, 200, 130)])
def test_products_equal_onednn_s(rows: int, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)
    weight, bias = weight.bfloat16(), bias.bfloat16()
    x, residual = torch.randn(rows, inputs).bfloat16(), torch.randn(rows, outputs).bfloat16()
    exact = x.float() @ weight.float().T + bias.float()
    for activation in (None, "gelu_new", "relu"):
        expected = exact if activation is None else ACTIVATIONS[activation](exact)
        found = NativeLinear(weight, bias, activation)(x)
        torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=2**-8)
        torch.testing.assert_close(found, OnednnLinear(weight, bias, activation)(x), rtol=2**-7, atol=2**-7)
    found = NativeLinear(weight, None, None)(x, residual)
    torch.testing.assert_close(found.float(), exact - bias.float() + residual.float(), rtol=2**-8, atol=2**-7)


@needs_bf16
def test_gelu_of_any_number() -> None:
    numbers = torch.tensor(
        [0.0, -0.0, 1e-30, 1e30, -1e30, 3e38, -3e38, math.inf, math.nan, *torch.linspace(-12, 12, 999)]
    )
    layer = NativeLinear(torch.tensor([[1.0, 0.0]]), None, "gelu_new")
    x = torch.stack([numbers, torch.zeros(len(numbers))], 1).bfloat16()
    expected = ACTIVATIONS["gelu_new"](x[:, :1].double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=2**-8, atol=1e-4, equal_nan=True)


@needs_bf16
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_output_of_every_row_is_computed_by_any_number_of_threads(threads: int) -> None:
    torch.manual_seed(0)
    weight, before = torch.randn(1000, 64).bfloat16(), torch.get_num_threads()
    layer = NativeLinear(weight, None, None)
    torch.set_num_threads(threads)
    try:
        for rows in [*range(1, 34), 100]:
            x = torch.randn(rows, 64).bfloat16()
            torch.testing.assert_close(layer(x).float(), x.float() @ weight.float().T, rtol=2**-8, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@needs_bf16
def test_a_row_s_product_has_the_same_bits_alone_and_among_others() -> None:
    torch.manual_seed(0)
    layer = NativeLinear(torch.randn(100, 256), torch.randn(100), "gelu_new")
    x = torch.randn(23, 256).bfloat16()
    together = layer(x)
    assert torch.equal(together, torch.cat([layer(row[None]) for row in x]))


@needs_bf16
def test_with_amx_onednn_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linear.choose_kind(torch.bfloat16, None) == LinearKind.NATIVE
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert linear.choose_kind(torch.bfloat16, None) == LinearKind.ONEDNN


@needs_bf16
def test_an_odd_number_of_inputs_is_onednn_s() -> None:
    layer = linear.pack(torch.randn(8, 5), None, LinearKind.NATIVE)
    assert isinstance(layer, OnednnLinear)


@needs_kernels
@pytest.mark.parametrize("head_size", [8, 16, 40, 64])
def test_a_query_s_attention_has_the_same_bits_alone_and_among_others(head_size: int) -> None:
    rng = np.random.default_rng(0)
    kernel, cache = NativeAttention(2, head_size, 16, torch.float32), torch.randn(2, 9, 2, 16, head_size)
    qkv = torch.randn(4, 6 * head_size)
    tables, lens = rng.permutation(np.arange(1, 9)).reshape(4, 2).astype(np.int32), np.array([3, 17, 32, 1], np.int32)
    slots = tables[np.arange(4), (lens - 1) // 16].astype(np.int64) * 16 + (lens - 1) % 16

    def attended(chosen: list[int]) -> torch.Tensor:
        loc = np.arange(len(chosen) + 1, dtype=np.int32)
        plan = kernel.plan(9, slots[chosen], loc, lens[chosen], tables[chosen], len(chosen))
        kernel.write(plan, qkv[chosen], cache)
        return kernel.attend(plan, qkv[chosen], cache, 0.3)

    together = attended([0, 1, 2, 3])
    assert torch.equal(together, torch.cat([attended([row]) for row in range(4)]))


@needs_kernels
@pytest.mark.parametrize(("slot", "block"), [(-1, 1), (32, 1), (16, -1), (16, 2)])
def test_what_is_outside_of_the_cache_is_refused(slot: int, block: int) -> None:
    kernel, loc, lens = NativeAttention(2, 16, 16, torch.float32), np.array([0, 1], np.int32), np.array([1], np.int32)
    with pytest.raises(IndexError, match="is not in the cache"):
        kernel.plan(2, np.array([slot]), loc, lens, np.array([[block]], np.int32), 1)


@needs_kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize("machine", ["x86-64-v3"])
def test_narrower_processors_compute_the_same(machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms of the code for processors without AVX-512."""
    rng = np.random.default_rng(0)
    qkv, tables = torch.randn(2, 3 * 40), rng.permutation(np.arange(1, 5)).reshape(2, 2).astype(np.int32)
    lens, loc = np.array([5, 29], np.int32), np.arange(3, dtype=np.int32)
    slots = tables[np.arange(2), (lens - 1) // 16].astype(np.int64) * 16 + (lens - 1) % 16

    def attended(dtype: torch.dtype) -> torch.Tensor:
        torch.manual_seed(0)
        kernel, cache = NativeAttention(1, 40, 16, dtype), torch.randn(2, 5, 1, 16, 40).to(dtype)
        plan = kernel.plan(5, slots, loc, lens, tables, 2)
        kernel.write(plan, qkv, cache)
        return kernel.attend(plan, qkv, cache, 0.3)

    expected = [attended(dtype) for dtype in native.TYPES]
    monkeypatch.setattr(native, "FLAGS_FOR_MACHINE", [["-march=no-such"], [f"-march={machine}"]])
    library = native._obtain([tmp_path])
    monkeypatch.setattr(native, "loaded", lambda: library)
    for dtype, before in zip(native.TYPES, expected, strict=True):
        torch.testing.assert_close(attended(dtype), before, rtol=1e-5, atol=1e-6, msg=str(dtype))
    test_every_fp8_number_is_read_exactly_and_the_nearest_is_written()


@needs_kernels
def test_every_fp8_number_is_read_exactly_and_the_nearest_is_written() -> None:
    """Through a cache of one token a block: what is written comes back as the only value attended to."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    between = torch.linspace(-500, 500, 2049)
    tiny = torch.linspace(-0.02, 0.02, 2049)
    numbers = torch.cat([codes[~codes.isnan()], between, tiny, torch.tensor([1e-30, -1e9, 1e9])])
    values = torch.nn.functional.pad(numbers, (0, -len(numbers) % 16)).view(-1, 16)
    kernel, cache = NativeAttention(1, 16, 16, FP8), torch.zeros(2, len(values) + 1, 1, 16, 16).to(FP8)
    qkv = torch.cat([torch.zeros(len(values), 32), values], 1)
    blocks = np.arange(1, len(values) + 1)
    loc, lens = np.arange(len(values) + 1, dtype=np.int32), np.ones(len(values), np.int32)
    plan = kernel.plan(len(values) + 1, blocks * 16, loc, lens, blocks[:, None].astype(np.int32), len(values))
    kernel.write(plan, qkv, cache)
    assert torch.equal(kernel.attend(plan, qkv, cache, 1.0), reference.to_fp8(values, 1.0).float())


@needs_kernels
@pytest.mark.parametrize("dtype", argmax.TYPES, ids=str)
def test_the_first_of_the_largest_or_the_first_nan_is_found(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for width in (1, 15, 16, 50, 1000):
        scores = torch.randint(-3, 3, (40, width)).to(dtype)  # with many equals
        scores[1] = -math.inf
        scores[2, width // 2 :] = math.inf
        scores[3, [width // 3, width - 1]] = math.nan
        scores[4, -1] = 9
        index, value = argmax.argmax(scores)
        numbers = scores.float().numpy()
        assert index.tolist() == numbers.argmax(axis=1).tolist()
        assert np.array_equal(value, numbers[np.arange(40), index], equal_nan=True)


@needs_kernels
def test_a_row_longer_than_its_table_is_refused() -> None:
    kernel, loc = NativeAttention(2, 16, 16, torch.float32), np.array([0, 1], np.int32)
    table = np.ones((1, 2), np.int32)
    kernel.plan(2, np.array([31]), loc, np.array([32], np.int32), table, 1)
    with pytest.raises(IndexError, match="33 tokens are not in tables of 2 blocks"):
        kernel.plan(2, np.array([31]), loc, np.array([33], np.int32), table, 1)


@needs_kernels
@pytest.mark.parametrize("head_size", [8, 24, 72, 256])
def test_any_number_of_threads_gives_the_same_bits(head_size: int) -> None:
    """More than there are queries or heads, and changed after the plan."""
    kernel, cache = NativeAttention(3, head_size, 16, torch.bfloat16), torch.randn(2, 5, 3, 16, head_size).bfloat16()
    qkv, loc, lens = torch.randn(2, 9 * head_size), np.arange(3, dtype=np.int32), np.array([32, 19], np.int32)
    tables, slots = np.array([[1, 2], [3, 4]], np.int32), np.array([47, 66])
    before = torch.get_num_threads()
    found = []
    try:
        for planned, used in ((1, 1), (7, 7), (2, 5), (5, 2)):
            torch.set_num_threads(planned)
            plan = kernel.plan(5, slots, loc, lens, tables, 2)
            torch.set_num_threads(used)
            kernel.write(plan, qkv, cache)
            found.append(kernel.attend(plan, qkv, cache, 0.3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found[1:])
    expected = reference.paged_attention(
        qkv, cache, torch.from_numpy(tables), torch.from_numpy(lens - 1), [0, 1, 2], lens.tolist(), 2, scale=0.3
    )
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)


@needs_kernels
def test_a_step_of_no_tokens_is_nothing() -> None:
    kernel, cache = NativeAttention(2, 16, 16, torch.float32), torch.zeros(2, 2, 2, 16, 16)
    none, nothing = np.zeros(0, np.int32), torch.zeros(0, 96)
    plan = kernel.plan(2, none.astype(np.int64), np.zeros(1, np.int32), none, np.zeros((0, 1), np.int32), 0)
    kernel.write(plan, nothing, cache)
    assert kernel.attend(plan, nothing, cache, 1.0).shape == (0, 32)


def test_heads_beyond_the_kernel_s_registers_are_torch_s() -> None:
    assert not native_attention.supports(torch.float32, 257)
    assert not native_attention.supports(torch.float16, 64)


@needs_kernels
def test_torch_s_operators_give_the_same_greedy_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the engine's facts tell which attend."""

    def answers() -> tuple[str, list[list[int]]]:
        with LLM("demo", device="cpu", dtype="float32", num_threads=1) as llm:
            outputs = llm.generate(PROMPTS, do_sample=False, max_new_tokens=24)
            return llm.info.attention_backend, [output.token_ids for output in outputs]

    name, tokens = answers()
    assert name == "cpu-native"
    monkeypatch.setattr(native, "library", lambda: None)
    assert answers() == ("cpu-paged-flash", tokens)


def chunks_step(head_size: int, cache_dtype: torch.dtype, chunks: list[tuple[int, int]]) -> dict[str, Any]:
    """Arguments of a step in which chunks of (context, tokens) attend, with NaN in all slots that are nobody's."""
    torch.manual_seed(0)
    heads, size = 3, 16
    blocks = [-(-(context + tokens) // size) for context, tokens in chunks]
    ids = iter((1 + torch.randperm(sum(blocks))).tolist())
    tables = np.zeros((len(chunks), max(blocks)), np.int32)
    cache = torch.full((2, sum(blocks) + 1, heads, size, head_size), math.nan).to(cache_dtype)
    positions, slots = [], []
    for row, (context, tokens) in enumerate(chunks):
        tables[row, : blocks[row]] = [next(ids) for _ in range(blocks[row])]
        places = np.arange(context + tokens)
        own = tables[row, places // size].astype(np.int64) * size + places % size
        cache[:, own[:context] // size, :, own[:context] % size] = torch.randn(context, 2, heads, head_size).to(
            cache_dtype
        )
        positions.append(places[context:])
        slots.append(own[context:])
    starts = np.cumsum([0, *(tokens for _, tokens in chunks)]).astype(np.int32)
    return {
        "qkv": torch.randn(int(starts[-1]), 3 * heads * head_size).bfloat16(),
        "cache": cache,
        "tables": tables,
        "positions": np.concatenate(positions),
        "slots": np.concatenate(slots),
        "starts": starts,
        "lengths": np.array([context + tokens for context, tokens in chunks], np.int32),
        "kernel": NativeAttention(heads, head_size, size, cache_dtype, torch.bfloat16),
    }


def attend_chunks(s: dict[str, Any]) -> torch.Tensor:
    kernel: NativeAttention = s["kernel"]
    plan = kernel.plan(s["cache"].shape[1], s["slots"], s["starts"], s["lengths"], s["tables"], 0)
    assert (
        plan.chunks.shape[1] == (np.diff(s["starts"]) > native_attention.MOST_QUERIES).sum() and not plan.prefill_rows
    )
    kernel.write(plan, s["qkv"], s["cache"], k_scale=0.5, v_scale=2.0)
    return kernel.attend(plan, s["qkv"], s["cache"], 0.3, k_scale=0.5, v_scale=2.0)


CHUNKS = [(0, 17), (5, 1), (64, 100), (31, 33), (0, 64), (15, 18), (200, 23)]


@needs_bf16
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("head_size", [64, 192])
def test_chunks_attend_to_what_is_before_them(head_size: int, cache_dtype: torch.dtype, threads: int) -> None:
    step = chunks_step(head_size, cache_dtype, CHUNKS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = attend_chunks(step)
    finally:
        torch.set_num_threads(before)
    expected = reference.paged_attention(
        step["qkv"].double(),
        step["cache"].double(),
        torch.from_numpy(step["tables"]),
        torch.from_numpy(step["positions"]),
        step["starts"].tolist(),
        step["lengths"].tolist(),
        0,
        scale=0.3,
        k_scale=0.5,
        v_scale=2.0,
    )
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)


@needs_bf16
def test_a_chunk_has_the_same_bits_alone_and_among_others() -> None:
    step = chunks_step(64, torch.bfloat16, CHUNKS)
    together = attend_chunks(step)
    for row, (start, end) in enumerate(itertools.pairwise(step["starts"].tolist())):
        alone = step | {
            "qkv": step["qkv"][start:end],
            "slots": step["slots"][start:end],
            "starts": np.array([0, end - start], np.int32),
            "lengths": step["lengths"][row : row + 1],
            "tables": step["tables"][row : row + 1],
        }
        assert torch.equal(attend_chunks(alone), together[start:end])
