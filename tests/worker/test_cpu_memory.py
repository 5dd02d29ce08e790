"""Memory in huge pages: a tensor like any other, zeroed, given back, and to be had from systems without such pages."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from octavo_kernels.cpu import memory

MIB = 1 << 20


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3 * MIB)])
def test_a_tensor_of_zeros(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tensor = memory.zeros(shape, dtype)
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous() and tensor.is_cpu
    assert not tensor.float().any()
    tensor[1, -1] = 2
    assert float(tensor.float().sum()) == 2


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux lends huge pages")
def test_it_starts_at_a_huge_page() -> None:
    assert memory.zeros([5 * MIB], torch.float32).data_ptr() % memory.HUGE_PAGE == 0


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without them")
def test_huge_pages_are_asked_for() -> None:
    tensor = memory.zeros([5 * MIB], torch.float32)
    is_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            start, end = (int(place, 16) for place in first.split("-"))
            is_ours = start <= tensor.data_ptr() < end
        elif is_ours and first == "VmFlags:":
            assert "hg" in rest
            return
    pytest.fail("the tensor is nowhere")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_is_taken_when_written_and_goes_with_the_last_view() -> None:
    before = resident()
    tensor = memory.zeros([256 * MIB], torch.uint8)
    assert resident() - before < 16 * MIB
    view = tensor.fill_(1)[MIB:]
    del tensor
    assert resident() - before > 240 * MIB
    del view
    assert resident() - before < 16 * MIB


def test_too_much_is_refused_as_torch_does() -> None:
    with pytest.raises(RuntimeError, match="allocate"):
        memory.zeros([1 << 50], torch.uint8)


def test_a_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345, raising=False)
    assert not memory.zeros([3 * MIB], torch.uint8).any()


def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert not memory.zeros([3 * MIB], torch.uint8).any()
