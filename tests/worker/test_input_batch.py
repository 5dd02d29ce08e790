"""How a batch's arrays travel to a device."""

import numpy as np
import torch
from octavo.worker.input_batch import pack, unpack, upload


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
