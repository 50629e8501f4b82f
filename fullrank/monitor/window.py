"""Sliding windows of rows, kept as blocks of moments; and the keys that were seen recently."""

import math
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from fullrank import sample
from fullrank.moments import Moments, merge


@dataclass
class Block:
    """Rows that arrived between `start` and `end` (seconds), as sums.

    energies (d,): variance along the reference's directions times rows, about the block's own mean; norms: their
    histogram; inputs: moments of their descriptors; zeros: rows of zeros that came beside them; sample: some of the
    rows, as they came; sample_inputs: their descriptors, NaN where there are none; copies (4,):
    `fullrank.profile.copies` among the rows, and with the block before.
    """

    start: float
    end: float
    moments: Moments
    energies: Tensor
    norms: Tensor
    inputs: Moments | None = None
    zeros: int = 0
    sample: Tensor | None = None
    copies: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    sample_inputs: Tensor | None = None

    def absorb(self, later: "Block") -> None:
        """Take in the block that follows."""
        self.end = later.end
        rows, others = self.moments.count, later.moments.count
        if self.sample is not None and later.sample is not None:
            described = sample.alike((self.sample_inputs, later.sample_inputs), (len(self.sample), len(later.sample)))
            self.sample = sample.joined(self.sample, rows, later.sample, others)
            self.sample_inputs = None if described is None else sample.joined(described[0], rows, described[1], others)
        elif self.sample is None and not rows:
            self.sample, self.sample_inputs = later.sample, later.sample_inputs
        self.moments.merge(later.moments)
        self.energies = self.energies + later.energies
        self.norms = self.norms + later.norms
        self.zeros += later.zeros
        self.copies = self.copies + later.copies
        if later.inputs is not None:
            self.inputs = later.inputs if self.inputs is None else self.inputs.merge(later.inputs)


def inputs_of(blocks: Sequence[Block]) -> Moments | None:
    """The moments of all inputs of these blocks; None if none has any.

    Of replicas that describe their inputs differently, as two versions do, those that describe most rows count.
    """
    described = defaultdict[int, list[Moments]](list)
    for block in blocks:
        if block.inputs is not None:
            described[block.inputs.dimension].append(block.inputs)
    return merge(max(described.values(), key=lambda them: sum(it.count for it in them))) if described else None


class Ring:
    """The blocks of the longest window, in order of time.

    Each window's own stretch holds at most `groups` blocks: the last 5 minutes 10, the 55 minutes before them 10
    more. Neighbours are joined where a stretch holds too many. So a busy minute and a quiet hour both end up in
    several groups, which the bounds need. A block leaves whole, when its first row is too old. Sums are added up
    again and never subtracted, so rounding does not build up. Memory: about 2 x groups x d^2 x 8 bytes with two
    windows, 42 MB at d = 512 and 671 MB at d = 2048 with 10.
    """

    def __init__(self, windows: Sequence[float], groups: int = 10) -> None:
        self.windows = tuple(sorted(windows))
        self.groups = groups
        self.blocks: list[Block] = []
        # Counts changes of the list: while it stands still, the latest so many blocks hold the same rows.
        self.changes = 0

    def add(self, block: Block) -> None:
        """Append a block, in order of time. Earlier inputs of another width are forgotten: they do not add up."""
        for earlier in self.blocks:
            if block.inputs and earlier.inputs and earlier.inputs.dimension != block.inputs.dimension:
                earlier.inputs = earlier.sample_inputs = None
        self.blocks.append(block)
        self.changes += 1
        self.expire(block.end)

    def expire(self, now: float) -> None:
        """Forget what is older than the longest window and join neighbours where a stretch has too many groups."""
        self.blocks = [block for block in self.blocks if now - block.start <= self.windows[-1]]
        newest = -math.inf
        for oldest in self.windows:
            while True:
                stretch = [i for i, b in enumerate(self.blocks) if newest < now - b.start <= oldest]
                if len(stretch) <= self.groups:
                    break
                spans = [(self.blocks[j].end - self.blocks[i].start, i) for i, j in pairwise(stretch)]
                _, first = min(spans)
                self.blocks[first].absorb(self.blocks.pop(first + 1))
                self.changes += 1
            newest = oldest

    def tensors(self, now: float) -> dict[str, Tensor]:
        """Copies of the blocks as tensors named "0.sum", "0.scatter", ..., their times as ages."""
        tensors: dict[str, Tensor] = {"blocks": torch.tensor([len(self.blocks)])}
        for i, block in enumerate(self.blocks):
            parts = {"ages": torch.tensor([now - block.start, now - block.end], dtype=torch.float64)}
            parts |= {"energies": block.energies, "norms": block.norms, **block.moments.tensors()}
            parts |= {"zeros": torch.tensor([block.zeros]), "copies": block.copies}
            if block.sample is not None:
                parts["sample"] = block.sample
            if block.sample_inputs is not None:
                parts["sample_inputs"] = block.sample_inputs
            if block.inputs is not None:
                parts |= {f"inputs.{name}": tensor for name, tensor in block.inputs.tensors().items()}
            tensors |= {
                f"{i}.{name}": tensor.clone(memory_format=torch.contiguous_format) for name, tensor in parts.items()
            }
        return tensors

    def load(self, tensors: Mapping[str, Tensor], now: float) -> None:
        """Replace the blocks by saved ones, aged as they were at `now`. ValueError for a missing or damaged tensor."""
        blocks = []
        for i in range(int(tensors.get("blocks", torch.zeros(1)))):
            parts = {name.removeprefix(f"{i}."): t for name, t in tensors.items() if name.startswith(f"{i}.")}
            if not {"ages", "energies", "norms"} <= parts.keys():
                raise ValueError(f"state: block {i} is incomplete")
            start, end = (now - age for age in parts["ages"].tolist())
            inputs = {name.removeprefix("inputs."): t for name, t in parts.items() if name.startswith("inputs.")}
            descriptors = Moments.from_tensors(inputs) if inputs else None
            moments = Moments.from_tensors(parts)
            zeros = int(parts.get("zeros", torch.zeros(1)))
            few = parts.get("sample")
            if few is not None and (few.ndim != 2 or few.shape[1] != moments.dimension):
                raise ValueError(f"state: the sample of block {i} has shape {tuple(few.shape)}")
            shown = parts.get("sample_inputs")
            if shown is not None and (few is None or shown.ndim != 2 or len(shown) != len(few)):
                raise ValueError(f"state: the sample's inputs of block {i} have shape {tuple(shown.shape)}")
            copies = parts.get("copies", torch.zeros(4)).to("cpu", torch.float64)
            if tuple(copies.shape) != (4,) or not copies.isfinite().all():
                raise ValueError(f"state: block {i}: copies are not four finite numbers")
            energies, norms = parts["energies"], parts["norms"]
            blocks.append(Block(start, end, moments, energies, norms, descriptors, zeros, few, copies, shown))
        self.blocks = blocks
        self.changes += 1

    def joined(self, groups: int, now: float) -> list[Block]:
        """The rows in fewer, new blocks: at most `groups` of each window's stretch. Their times are ages."""
        fewer = list[Block]()
        newest = -math.inf
        for oldest in self.windows:
            stretch = [block for block in self.blocks if newest < now - block.start <= oldest]
            newest = oldest
            parts = min(groups, len(stretch))
            for part in range(parts):
                first, *rest = stretch[part * len(stretch) // parts : (part + 1) * len(stretch) // parts]
                moments = Moments(first.moments.dimension, first.moments.shift).merge(first.moments)
                joined = replace(first, start=now - first.start, end=now - first.end, moments=moments)
                joined.inputs = _copied(first.inputs)
                for later in rest:
                    joined.absorb(replace(later, end=now - later.end, inputs=_copied(later.inputs)))
                fewer.append(joined)
        return fewer

    def within(self, seconds: float, now: float) -> list[Block]:
        """The blocks all of whose rows arrived in the last `seconds`."""
        return [block for block in self.blocks if now - block.start <= seconds]


def _copied(moments: Moments | None) -> Moments | None:
    return None if moments is None else merge([moments])


class RecentKeys:
    """A set of keys that forgets: each key after `horizon` seconds, and the oldest of more than `limit`."""

    def __init__(self, horizon: float, limit: int = 1 << 18) -> None:
        self.horizon = horizon
        self.limit = limit
        self._entered: OrderedDict[Hashable, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entered)

    def holds(self, key: Hashable, now: float) -> bool:
        """Whether the key entered within the horizon."""
        entered = self._entered
        while entered and now - next(iter(entered.values())) >= self.horizon:
            entered.popitem(last=False)
        return key in entered

    def enter(self, key: Hashable, now: float) -> bool:
        """Whether the key is new; if it is, it now counts as seen. Seeing it again does not prolong its stay."""
        if self.holds(key, now):
            return False
        entered = self._entered
        entered[key] = now
        if len(entered) > self.limit:
            entered.popitem(last=False)
        return True
