"""How a batch's arrays travel to a device."""

import numpy as np
import pytest
import torch
from octavo.step import SchedulerOutput
from octavo.worker.input_batch import InputBatchBuilder, pack, unpack, upload
from octavo.worker.request_states import RequestStates


def test_packed_arrays_come_out_as_they_went_in():
    arrays = [
        np.array([2**40, -1, 3]),
        np.empty(0, np.int64),
        np.arange(5, dtype=np.int32),  # 20 bytes: the next is padded to 24
        np.arange(12, dtype=np.int32).reshape(3, 4)[:, :3],  # not contiguous
        np.array([7]),
    ]
    packed = pack(arrays, pinned=False)
    assert packed.shape == (24 + 0 + 24 + 40 + 8,)
    for sent, came in zip(arrays, unpack(packed, arrays), strict=True):
        assert torch.equal(came, torch.from_numpy(np.ascontiguousarray(sent)))
        assert came.dtype == torch.from_numpy(sent).dtype


def test_upload_to_the_cpu_copies_nothing():
    array = np.arange(3)
    (tensor,) = upload([array], torch.device("cpu"))
    array[0] = 9
    assert tensor.tolist() == [9, 1, 2]


@pytest.mark.parametrize(("lengths", "expected"), [([1, 1, 1], 3), ([1, 1, 5, 1], 2), ([5, 1], 0)])
def test_rows_of_one_token_count_as_decode_rows_though_they_prefill(lengths, expected):
    rows = np.arange(len(lengths), dtype=np.int32)
    step = SchedulerOutput(1, rows, 0 * rows, np.array(lengths, np.int32), rows < 0, num_decode_rows=min(expected, 1))
    builder = InputBatchBuilder(RequestStates(4, 64, 16, 99), torch.device("cpu"))
    assert builder.build(step, np.empty(0, np.int64)).num_decode_rows == expected
