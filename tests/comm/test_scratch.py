"""Message buffers come back whole, whatever they were used as."""

from __future__ import annotations

import torch

from ds_fp8.comm import scratch

CPU = torch.device("cpu")


def test_a_buffer_used_as_fp32_serves_the_next_message_of_bytes():
    """7840 bytes taken as 1960 floats: the next 1960 bytes are 1960 bytes, out of the same memory."""
    scratch._free.clear()
    floats = scratch.take(7840, CPU).view(torch.float32)
    address = floats.data_ptr()
    scratch.give_back(floats)
    for size in (1960, 7840):
        again = scratch.take(size, CPU)
        assert (again.dtype, again.numel(), again.data_ptr()) == (torch.uint8, size, address)
        scratch.give_back(again)


def test_taken_memory_is_nobody_elses_and_the_largest_is_kept():
    scratch._free.clear()
    taken = [scratch.take(100 + n, CPU) for n in range(scratch.MOST_KEPT + 2)]
    assert len({one.data_ptr() for one in taken}) == len(taken)
    scratch.give_back(*taken)
    assert sorted(kept.numel() for kept in scratch._free) == list(range(102, 102 + scratch.MOST_KEPT))
