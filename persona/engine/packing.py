"""Examples -> packs: the tokens that go through the model at a time.

Every reply is an example with its whole context, so the examples of an update repeat each other: the system prompt, and
the earlier turns of a conversation. Sorted by their tokens, those that begin alike are neighbours, and each shares with
the one before it all that it shares with any before. So one walk over them makes a prefix tree: an example adds the
tokens behind the common prefix; each token is computed once, and attends to its ancestors and itself. The tree is cut
into packs that fit the memory. If the architecture does not allow this (`persona.engine.trial`), a pack is rows of one
example each. Loss and gradients are the same either way.

Attention over a tree is computed in pieces. A block is neighbouring tokens and all that some of them attend to, with a
mask (`persona.engine.attention`). A call is what a fused kernel can do without a mask (`persona.engine.flash`): the
tree consists of nodes, stretches without a branch inside, and a node attends to itself causally and to every node above
it fully. As the tokens are in depth-first order, what is below a node follows it.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch

from persona.model.render import Example

T = TypeVar("T")
BLOCK = 192  # tokens that attend at once on a CPU: few enough that their scores stay in its cache
BLOCK_ON_GPU = 512  # a GPU works through larger products sooner than it starts many of them

Stretch = tuple[int, int]  # tokens begin..end of a pack
Segment = tuple[Sequence[int], int, int]  # ancestors from the root on, first new token, end of the new tokens


@dataclass(frozen=True)
class Block:
    """Tokens begin..end of a pack, and the tokens they attend to."""

    begin: int
    end: int
    sources: Sequence[Stretch]
    """Stretches of the pack that some of the block's tokens attend to; the last is the block itself."""
    bias: torch.Tensor
    """(tokens, last of the sources' tokens) float32, added to the scores: 0 where a token attends, else -inf; to the
    sources' tokens before these, all attend."""


@dataclass(frozen=True)
class Side:
    """The queries or the keys of a call: one sequence after another."""

    rows: slice | torch.Tensor
    """Their tokens in the pack."""
    starts: torch.Tensor  # (sequences + 1,) int32, where each sequence begins among these tokens, and the end
    longest: int
    places: torch.Tensor  # (tokens,) their places if each sequence were filled up to the longest, `padded`


@dataclass(frozen=True)
class Call:
    """Sequences of queries, and the sequence of keys that each attends to: all of it, or causally."""

    queries: Side
    keys: Side
    causal: bool


@dataclass(frozen=True)
class Reach:
    """How far back an attention reaches that slides over the text."""

    depths: torch.Tensor
    """(tokens,) the position of each token of a pack in its example."""
    window: int


class Tree:
    """Who attends to whom in a pack on `device`; blocks have up to `size` tokens, if a block is not one token."""

    def __init__(self, segments: Sequence[Segment], device: torch.device, size: int | None = None) -> None:
        self.segments, self.device = segments, device
        self.size = size or (BLOCK if device.type == "cpu" else BLOCK_ON_GPU)
        self.longest = max(len(ancestors) + end - begin for ancestors, begin, end in segments)
        """Tokens of the longest example."""
        self._made: dict[Any, Any] = {}

    def once(self, make: Callable[..., T], *args: Any) -> T:
        """`make` of this tree and `args`, made once for all layers."""
        if (make, args) not in self._made:
            self._made[make, args] = make(self, *args)
        return self._made[make, args]

    @cached_property
    def nodes(self) -> tuple[Sequence[Stretch], Sequence[int | None]]:
        """The nodes in the order of their tokens, and the number of the parent of each."""
        return _nodes(self.segments)

    @cached_property
    def blocks(self) -> Sequence[Block]:
        """The blocks in the order of their tokens."""
        return [_block(group, self.device, None) for group in _grouped(self.segments, self.size)]

    def blocks_within(self, window: int | None) -> Sequence[Block]:
        """The blocks if a token attends only to itself and the `window` - 1 ancestors before it."""
        if window is None or window >= self.longest:
            return self.blocks
        return self.once(_blocks_within, window)

    @cached_property
    def calls(self) -> Sequence[Call]:
        """The first has every node attend to itself; each further one all below the nodes of one depth to these."""
        nodes, parents = self.nodes
        stretches = [side for pair in [(nodes, nodes), *_inner(nodes, parents)] for side in pair]
        starts = to_device(self.device, [_starts(side) for side in stretches], torch.int32)
        rows = to_device(self.device, [_tokens(side) for side in stretches], torch.long)
        places = to_device(self.device, [_places(side) for side in stretches], torch.long)
        sides = [_side(*parts) for parts in zip(stretches, starts, rows, places, strict=True)]
        return [Call(*pair, causal=n == 0) for n, pair in enumerate(zip(sides[::2], sides[1::2], strict=True))]


@dataclass(frozen=True)
class Pack:
    """Input of one pass through the model, its supervised positions, and their targets."""

    input_ids: torch.Tensor  # (rows, length)
    position_ids: torch.Tensor | None  # (rows, length), None if they just count
    tree: Tree | None  # who attends to whom; None is plain causal attention within each row
    positions: torch.Tensor  # (supervised,) positions of the logits in the flattened input
    targets: torch.Tensor  # (supervised,) the right token there; a position may have several


def inputs(example: Example) -> tuple[int, ...]:
    """The tokens that the model reads for an example; its last one is only a target."""
    return (*example.prompt_ids, *example.reply_ids[:-1])


def portion(examples: Sequence[Example], rank: int, count: int, share: bool) -> Sequence[Example]:
    """The examples that process `rank` of `count` computes; may be none if there are fewer examples than processes.

    Those that begin alike stay together, and each process gets about as many tokens; with `share`, tokens that an
    example has in common with its neighbour count once.
    """
    if count == 1:
        return examples
    ordered = sorted(examples, key=inputs)
    costs = [1 + len(inputs(example)) for example in ordered]
    if share and ordered:
        # the prefix of all examples costs every process the same; it is taken off the first one
        costs[0] -= _common(inputs(ordered[0]), inputs(ordered[-1]))
        for place in range(1, len(ordered)):
            costs[place] -= _common(inputs(ordered[place - 1]), inputs(ordered[place]))
    ends = list(itertools.accumulate(costs))
    owners = [int((end - cost / 2) * count / ends[-1]) for end, cost in zip(ends, costs, strict=True)]
    return [example for example, owner in zip(ordered, owners, strict=True) if owner == rank]


def count_tokens(examples: Sequence[Example], share: bool) -> int:
    """The tokens that a pack of `examples`, in the order of `plan_packs`, computes."""
    read = [inputs(example) for example in examples]
    if not share:
        return len(read) * max(map(len, read))
    return sum(len(ids) - _common(before, ids) for before, ids in zip([(), *read], read, strict=False))


def plan_packs(examples: Sequence[Example], max_tokens: int, share: bool) -> list[list[Example]]:
    """Examples in as few packs as `max_tokens` allows, trees of about the same size; a longer example goes alone.

    The sum of the packs' losses does not depend on the grouping.
    """
    return _plan_trees(examples, max_tokens) if share else _plan_rows(examples, max_tokens)


def _plan_rows(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    groups: list[list[Example]] = []
    # sorted by length, so that the rows of a pack need little filling
    for example in sorted(examples, key=lambda example: len(inputs(example)), reverse=True):
        if groups and (len(groups[-1]) + 1) * len(inputs(groups[-1][0])) <= max_tokens:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def _plan_trees(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    # in this order an example shares with its neighbour all that it shares with any example before it
    ordered = sorted(examples, key=inputs)
    read = [inputs(example) for example in ordered]
    new = [len(ids) - _common(before, ids) for before, ids in zip([(), *read], read, strict=False)]

    def firsts(limit: int) -> list[int]:
        """The places where packs begin if each is filled up to `limit`, which takes the fewest packs."""
        begins: list[int] = []
        size = 0
        for place, ids in enumerate(read):
            size += new[place]
            if not begins or size > limit:
                begins.append(place)
                size = len(ids)
        return begins

    # The smallest limit that takes no more packs: a last pack of few tokens would compute the system prompt once more,
    # even packs need less memory, and blocks of one size fit into the memory of those before.
    few = len(firsts(max_tokens))
    smallest = bisect.bisect_left(range(max_tokens), True, key=lambda limit: len(firsts(limit)) <= few)
    begins = firsts(smallest)
    return [ordered[begin:end] for begin, end in itertools.pairwise([*begins, len(ordered)])]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def pack(examples: Sequence[Example], device: torch.device, share: bool, block: int | None = None) -> Pack:
    """One pack of `examples`, in the order of `plan_packs`, on `device`; `block` tokens of a tree attend at once."""
    # On a CPU torch's own attention is quicker for one example; on a GPU transformers would wait for a row's positions.
    if not share or (len(examples) == 1 and device.type == "cpu"):
        return _rows(examples, device)
    return _tree(examples, device, block)


def _rows(examples: Sequence[Example], device: torch.device) -> Pack:
    # Filled up on the right: with causal attention no token attends to those right of it, so the filling needs no mask
    # and no token of its own.
    width = max(len(inputs(example)) for example in examples)
    rows: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(examples):
        ids = inputs(example)
        rows += [*ids, *[0] * (width - len(ids))]
        first = row * width + len(example.prompt_ids) - 1
        positions += range(first, first + len(example.reply_ids))
        targets += example.reply_ids
    ids, at, right = to_device(device, (rows, positions, targets), torch.long)
    return Pack(ids.view(-1, width), None, None, at, right)


def _tree(examples: Sequence[Example], device: torch.device, block: int | None) -> Pack:
    ids: list[int] = []
    depths: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    path: list[int] = []  # nodes from the root to the end of the example before
    segments: list[Segment] = []
    previous: tuple[int, ...] = ()
    for example in examples:
        tokens = inputs(example)
        shared = _common(previous, tokens)
        begin = len(ids)
        ids += tokens[shared:]
        depths += range(shared, len(tokens))
        if begin < len(ids):
            segments.append((path[:shared], begin, len(ids)))
        path = [*path[:shared], *range(begin, len(ids))]
        positions += path[len(example.prompt_ids) - 1 :]
        targets += example.reply_ids
        previous = tokens
    row, depth, at, right = to_device(device, (ids, depths, positions, targets), torch.long)
    return Pack(row[None], depth[None], Tree(segments, device, block), at, right)


# --- the tree in pieces -----------------------------------------------------------------------------------------------


def to_device(device: torch.device, columns: Sequence[Sequence[int]], dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """A tensor (numbers,) of each of `columns`, in one copy that nothing waits for."""
    flat = torch.tensor([number for column in columns for number in column], dtype=dtype)
    return moved(flat, device).split([len(column) for column in columns])


def padded(length: int) -> int:
    """`length` as memory-efficient attention fills it up for its log-sum-exp."""
    return -(-length // 32) * 32


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` of the CPU on `device`; a GPU goes on with its work while it is copied."""
    # only from pinned memory does a copy not wait for all that was started before
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _grouped(segments: Sequence[Segment], size: int) -> list[list[Segment]]:
    """Neighbouring segments in groups of up to `size` tokens; longer segments are cut into even pieces."""
    cuts = {ancestors[-1] + 1 for ancestors, _, _ in segments if ancestors}
    groups: list[list[Segment]] = [[]]
    for ancestors, begin, end in segments:
        path = ancestors
        inner = sorted(cut for cut in cuts if begin < cut < end)
        for first, last in itertools.pairwise([begin, *inner, end]):
            count = -(-(last - first) // size)
            edges = [first + (last - first) * i // count for i in range(count + 1)]
            for start, stop in itertools.pairwise(edges):
                if groups[-1] and stop - groups[-1][0][1] > size:
                    groups.append([])
                groups[-1].append((path, start, stop))
                path = [*path, *range(start, stop)]
    return groups


def _blocks_within(tree: Tree, window: int) -> Sequence[Block]:
    depths = [len(ancestors) + place for ancestors, begin, end in tree.segments for place in range(end - begin)]
    reach = Reach(torch.tensor(depths), window)
    return [_block(group, tree.device, reach) for group in _grouped(tree.segments, tree.size)]


def _block(group: Sequence[Segment], device: torch.device, reach: Reach | None) -> Block:
    first, end = group[0][1], group[-1][2]
    seen = torch.zeros(end - first, end, dtype=torch.bool)
    for ancestors, start, stop in group:
        seen[start - first : stop - first, ancestors] = True
        seen[start - first : stop - first, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
    if reach is not None:
        seen &= reach.depths[first:end, None] - reach.depths[:end] < reach.window
    by_all = seen[:, :first].all(0).nonzero().flatten().tolist()
    by_some = (seen[:, :first].any(0) & ~seen[:, :first].all(0)).nonzero().flatten().tolist()
    seen_by_some = seen[:, [*by_some, *range(first, end)]]
    bias = torch.zeros(seen_by_some.shape).masked_fill_(~seen_by_some, float("-inf"))
    return Block(first, end, [*_stretches(by_all), *_stretches(by_some), (first, end)], moved(bias, device))


def _stretches(positions: Sequence[int]) -> list[Stretch]:
    """Ascending positions as stretches begin..end of neighbours."""
    breaks = [i for i in range(1, len(positions)) if positions[i] != positions[i - 1] + 1]
    edges = [0, *breaks, len(positions)] if positions else []
    return [(positions[a], positions[b - 1] + 1) for a, b in itertools.pairwise(edges)]


def _nodes(segments: Sequence[Segment]) -> tuple[list[Stretch], list[int | None]]:
    parent_ends = {begin: ancestors[-1] + 1 if ancestors else 0 for ancestors, begin, _ in segments}
    edges = {segments[-1][2]}
    for begin, above in parent_ends.items():
        if begin != above or begin == 0:  # else it goes on where the segment before it ends
            edges |= {begin, above}
    nodes = list(itertools.pairwise(sorted(edges | {0})))
    ending = {end: number for number, (_, end) in enumerate(nodes)}
    # a cut within a segment has the node before it as parent
    return nodes, [ending.get(parent_ends.get(begin, begin)) for begin, _ in nodes]


def _inner(
    nodes: Sequence[Stretch], parents: Sequence[int | None]
) -> list[tuple[Sequence[Stretch], Sequence[Stretch]]]:
    """For each depth, what is below each of its inner nodes, and these nodes."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent is None else depths[parent] + 1)
    ends = [end for _, end in nodes]
    for number in reversed(range(len(nodes))):
        if (parent := parents[number]) is not None:
            ends[parent] = max(ends[parent], ends[number])
    pairs: list[tuple[Sequence[Stretch], Sequence[Stretch]]] = []
    for depth in range(max(depths)):
        inner = [n for n, (_, end) in enumerate(nodes) if depths[n] == depth and ends[n] > end]
        pairs.append(([(nodes[n][1], ends[n]) for n in inner], [nodes[n] for n in inner]))
    return pairs


def _side(stretches: Sequence[Stretch], starts: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> Side:
    whole = slice(stretches[0][0], stretches[-1][1])
    return Side(rows if len(rows) else whole, starts, _longest(stretches), places)


def _longest(stretches: Sequence[Stretch]) -> int:
    return max(end - begin for begin, end in stretches)


def _starts(stretches: Sequence[Stretch]) -> Sequence[int]:
    return [0, *itertools.accumulate(end - begin for begin, end in stretches)]


def _tokens(stretches: Sequence[Stretch]) -> Sequence[int]:
    """The tokens of `stretches`; none if they are neighbours, as then no list of them is needed."""
    if all(before[1] == after[0] for before, after in itertools.pairwise(stretches)):
        return []
    return [token for begin, end in stretches for token in range(begin, end)]


def _places(stretches: Sequence[Stretch]) -> Sequence[int]:
    width = padded(_longest(stretches))
    return [n * width + i for n, (begin, end) in enumerate(stretches) for i in range(end - begin)]
