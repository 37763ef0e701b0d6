"""How flats, stores and messages are cut: small pure functions, by hand."""

from __future__ import annotations

import torch

from ds_fp8.comm import Wire
from ds_fp8.comm.cut import adjacent, cut_by_owner, cut_each, join, together
from ds_fp8.zero.weights_store import share_bounds
from ds_fp8.zero.wire import spread_over


def test_a_ranks_share_of_a_store_is_what_it_owns_of_the_flat():
    """Tensors of 10, 6 and 8 elements at 0, 12 and 18 of a flat of 32, in a store at 0, 16 and 32 (each begins at 16):
    rank 0 owns the flat's [0, 16), so all of the first and 4 of the second.
    """
    spans = [(0, 10, 0), (12, 6, 16), (18, 8, 32)]
    assert share_bounds(spans, 48, 16, 2) == [0, 20, 48]
    assert share_bounds(spans, 48, 8, 4) == [0, 8, 20, 38, 48]
    assert share_bounds([], 0, 16, 2) == [0, 0, 0]


def test_a_part_is_spread_over_the_targets_that_it_meets():
    """Targets of 3, 0, 4 and 2 elements end to end; five values from the second element on."""
    targets = [torch.zeros(n) for n in (3, 0, 4, 2)]
    found = [(number, at, part.tolist()) for number, at, part in spread_over(targets, 1, torch.arange(5.0))]
    assert found == [(0, 1, [0.0, 1.0]), (2, 0, [2.0, 3.0, 4.0])]
    assert list(spread_over(targets, 9, torch.arange(2.0))) == []


def test_each_owner_has_a_chunk_of_every_parameter():
    """Two parameters of 8 and 5 elements for three ranks: chunks of 3, 3, 2 and of 2, 2, 1. In rounds of blocks the
    sequence is cut, not the parameters; what lies together is one span.
    """
    cut = cut_each((8, 5), 3)
    assert cut.spans == (((0, 3), (8, 10)), ((3, 6), (10, 12)), ((6, 8), (12, 13)))
    assert cut.numels == (5, 5, 3)
    assert cut_each((8, 5), 3) is cut, "made once"
    assert cut_by_owner(((0, 4), (0, 6), (2, 1), (0, 2)), 3).spans == (((0, 10), (11, 13)), (), ((10, 11),))
    long = cut_each((400, 200), 2)
    rounds = long.rounds(Wire.named("e4m3", 256), 1, torch.device("cpu"))
    assert [part.start for part in rounds] == [0, 128, 256]
    assert [part.own.spans[0] for part in rounds] == [((200, 328),), ((328, 400), (500, 556)), ((556, 600),)]
    assert [part.sent.spans for part in rounds] == [(((0, 128),),), (((128, 200), (400, 456)),), (((456, 500),),)]


def test_gradients_of_a_full_buffer_are_taken_as_they_lie():
    buffer = torch.arange(10.0)
    found = adjacent([buffer[2:5], buffer[5:9]])
    assert found.data_ptr() == buffer[2:].data_ptr() and found.tolist() == buffer[2:9].tolist()
    assert adjacent([buffer[2:5], buffer[5:5], buffer[5:9]]).tolist() == found.tolist()
    assert adjacent([buffer[2:5], buffer[6:9]]) is None
    bucket, starts = together([buffer[5:9], buffer[3:3], buffer[2:5]])
    assert bucket.data_ptr() == buffer[2:].data_ptr() and starts == (3, 0, 0)
    assert cut_each((4, 3), 2, (3, 0)).spans == (((3, 5), (0, 2)), ((5, 7), (2, 3)))
    bucket, starts = together([buffer[6:9], buffer[:2]])
    assert bucket.tolist() == [6.0, 7.0, 8.0, 0.0, 1.0] and starts == (0, 3)
    assert join([buffer[6:9], buffer[:2]]).tolist() == [6.0, 7.0, 8.0, 0.0, 1.0]


def test_rounds_of_a_message_cut_every_owners_slice_at_blocks():
    """Slices of 1000, 0 and 300 elements in rounds of at most 512: each element once, every cut but the last at 128."""
    numels = [1000, 0, 300]
    rounds = list(Wire.named("e4m3", 512).chunks(numels, torch.device("cpu")))
    for owner, numel in enumerate(numels):
        cuts = [cut[owner] for cut in rounds]
        assert all(start % 128 == 0 or start == numel for start, _ in cuts)
        assert [start for start, _ in cuts[1:]] == [stop for _, stop in cuts[:-1]]
        assert (cuts[0][0], cuts[-1][1]) == (0, numel)
    assert len(rounds) == 3
