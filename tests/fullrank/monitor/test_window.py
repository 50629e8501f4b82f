import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank import Moments, merge
from fullrank.monitor.window import Block, RecentKeys, Ring, inputs_of


def block(start, end, value=0.0):
    rows = torch.full((2, 1), float(value))
    return Block(start, end, Moments(1, [0.0]).add(rows), torch.ones(1).double(), torch.ones(3).long())


@given(st.lists(st.floats(0.1, 40), min_size=1, max_size=120))
@settings(max_examples=25)
def test_every_window_holds_only_its_rows_and_few_groups(gaps):
    ring, now, blocks = Ring((300.0, 3600.0), groups=6), 0.0, []
    for gap in gaps:
        blocks.append((now, now + gap / 2))
        ring.add(block(*blocks[-1]))
        now += gap
    ring.expire(now)
    assert len(ring.blocks) <= 12
    for seconds in (300.0, 3600.0):
        held = ring.within(seconds, now)
        assert all(now - b.start <= seconds for b in held)
        if now > seconds:
            # What is missing of the window is one group, and no group outgrows its stretch.
            assert sum(b.moments.count for b in held) / 2 <= sum(now - start <= seconds for start, _ in blocks)


def test_steady_traffic_keeps_most_of_the_window_in_many_groups():
    ring = Ring((300.0, 3600.0))
    counts, groups = [], []
    for i in range(450):
        ring.add(block(13.0 * i, 13.0 * i + 12))
        if i > 150:
            held = ring.within(300.0, 13.0 * i + 12)
            counts.append(sum(b.moments.count for b in held) / 2)
            groups.append(len(held))
    assert min(groups) >= 5
    assert min(counts) >= 16  # of 23 blocks
    assert sum(counts) / len(counts) >= 19


def test_blocks_at_one_instant_stay_apart_up_to_the_limit():
    ring = Ring((300.0,), groups=4)
    for i in range(9):
        ring.add(block(0.0, 0.0, i))
    assert len(ring.blocks) == 4
    assert merge(b.moments for b in ring.blocks).mean() == 4.0


def test_old_rows_leave_by_the_clock_alone():
    ring = Ring((300.0, 3600.0))
    ring.add(block(0.0, 10.0))
    ring.expire(301.0)
    assert ring.within(300.0, 301.0) == []
    assert len(ring.within(3600.0, 301.0)) == 1
    ring.expire(3601.0)
    assert ring.blocks == []


def test_a_key_enters_once_a_horizon():
    keys = RecentKeys(10.0)
    assert keys.enter("a", 0.0)
    assert not keys.enter("a", 5.0)
    assert not keys.enter("a", 9.9)
    assert keys.enter("a", 10.0)
    assert len(keys) == 1


def test_keys_are_bounded_oldest_first():
    keys = RecentKeys(10.0, limit=3)
    for key in range(5):
        assert keys.enter(key, 0.0)
    assert len(keys) == 3
    assert keys.enter(0, 1.0)
    assert not keys.enter(4, 1.0)


def test_sampled_rows_stay_beside_their_inputs_through_joining_and_saving():
    """The descriptor of row x is (x, 2 x): so it is after groups were joined, thinned, saved and loaded."""
    ring, rows = Ring((300.0,), groups=3), 0.0
    for i in range(12):
        part = torch.arange(rows, rows + 90)[:, None] + 1
        rows += 90
        shown = None if i in (0, 7) else torch.cat((part, 2 * part), 1)
        one = block(float(i), float(i))
        one.moments.add(part[:-2])
        one.sample, one.sample_inputs = part, shown
        ring.add(one)
    again = Ring((300.0,), groups=3)
    again.load(ring.tensors(12.0), 12.0)
    for held in (*ring.blocks, *again.blocks, *ring.joined(2, 12.0)):
        assert held.sample is not None
        assert held.sample_inputs is not None
        known = held.sample_inputs.isfinite().all(1)
        assert torch.equal(held.sample_inputs[known], held.sample[known] * torch.tensor([1.0, 2.0]))
        assert int(known.sum()) > 0
    wrong = ring.tensors(12.0) | {"0.sample_inputs": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match="sample's inputs of block 0"):
        again.load(wrong, 12.0)


def described(start, width, rows):
    """A block of so many rows whose inputs have that width."""
    one = block(start, start)
    one.inputs = Moments(width).add(torch.randn(rows, width, generator=torch.Generator().manual_seed(int(start))))
    one.sample, one.sample_inputs = torch.ones(2, 1), torch.ones(2, width)
    return one


def test_inputs_of_another_width_take_the_place_of_earlier_ones():
    ring = Ring((300.0,), groups=3)
    for i in range(12):
        ring.add(described(float(i), 2 if i < 9 else 5, 30))
    ring.add(block(12.0, 12.0))
    assert sum(b.moments.count for b in ring.blocks) == 26
    assert inputs_of(ring.blocks).count == 90
    assert inputs_of(ring.joined(1, 12.0)).dimension == 5


def test_of_replicas_that_describe_inputs_differently_those_with_most_rows_count():
    blocks = [described(0.0, 2, 30), described(1.0, 5, 50), described(2.0, 2, 30), block(3.0, 3.0)]
    found = inputs_of(blocks)
    assert (found.dimension, found.count) == (2, 60)
    assert torch.allclose(found.mean(), merge([blocks[0].inputs, blocks[2].inputs]).mean())
    assert blocks[0].inputs.count == 30
    assert inputs_of(blocks[3:]) is None
