"""Which records are held out: never two of one group on both sides, and never a reply that is learned elsewhere.

Records that share a group or the text of a reply are one component, and components go to one side whole. The
fingerprints that find them lie on the disk in parts; memory holds twelve bytes a record.
"""

import math
from array import array
from collections.abc import Iterable
from pathlib import Path

_PARTS = 256
_BUFFERED = 2048  # numbers of one part in memory


def fingerprint(text: str) -> int:
    """64 bits of a text, good within this process; two of a million texts agree once in 40 million conversions."""
    return hash(text) & 0xFFFF_FFFF_FFFF_FFFF


class Seen:
    """A set of fingerprints in eight to sixteen bytes each, where Python's own takes seventy."""

    def __init__(self) -> None:
        self._count, self._slots = 0, array("Q", bytes(8 * 1024))

    def add(self, value: int) -> bool:
        """Put `value` in; whether it was new."""
        if 3 * self._count > 2 * len(self._slots):
            self._grow()
        return self._put(value or 1)

    def _put(self, value: int) -> bool:
        slots, mask = self._slots, len(self._slots) - 1
        place = value & mask
        while other := slots[place]:
            if other == value:
                return False
            place = (place + 1) & mask
        slots[place] = value
        self._count += 1
        return True

    def _grow(self) -> None:
        old, self._count = self._slots, 0
        self._slots = array("Q", bytes(16 * len(old)))
        for value in old:
            if value:
                self._put(value)


class Split:
    """Records by their number, from 0 without gaps, gathered into components and then divided."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._buffers = [array("Q") for _ in range(_PARTS)]
        self._parents = array("I")
        self._ranks = array("Q")
        self._pinned = bytearray()  # 1 for a record that must not be held out

    def add(self, rank: int, bonds: Iterable[int], pinned: bool = False) -> int:
        """The number of the next record, whose group has this rank; a bond holds together the records that have it."""
        number = len(self._parents)
        self._parents.append(number)
        self._pinned.append(pinned)
        self._ranks.append(rank)
        for bond in bonds:
            buffer = self._buffers[bond % _PARTS]
            buffer.append(bond)
            buffer.append(number)
            if len(buffer) >= _BUFFERED:
                with self._part(bond % _PARTS).open("ab") as file:
                    buffer.tofile(file)
                del buffer[:]
        return number

    def _part(self, part: int) -> Path:
        return self._folder / f"bonds-{part}"

    def held_out(self, ratio: float) -> bytearray:
        """A 1 for each record that is held out; about `ratio` of all records.

        Components are taken in the order of their ranks, each if it brings the held-out part nearer to `ratio`; at
        least one is taken and one is left, when there are two.
        """
        self._join()
        parents, ranks = self._parents, self._ranks
        held = bytearray(len(parents))
        sizes = array("I", bytes(4 * len(parents)))
        for number in range(len(parents)):
            root = parents[number] = self._root(number)
            sizes[root] += 1
            ranks[root] = min(ranks[root], ranks[number])
            self._pinned[root] |= self._pinned[number]
        roots = sorted((root for root in range(len(parents)) if sizes[root]), key=ranks.__getitem__)
        free = [root for root in roots if not self._pinned[root]]
        if ratio == 0 or len(roots) < 2 or not free:
            return held
        target, taken, chosen = max(1, round(ratio * sum(map(sizes.__getitem__, free)))), 0, 0
        for root in free:
            if taken + sizes[root] / 2 <= target and chosen < len(roots) - 1:
                held[root] = 1
                taken, chosen = taken + sizes[root], chosen + 1
        if not chosen:
            held[min(free, key=sizes.__getitem__)] = 1
        return bytearray(held[parents[number]] for number in range(len(parents)))

    def _join(self) -> None:
        """Join the records that share a bond, one part of the bonds at a time."""
        for part, buffer in enumerate(self._buffers):
            bonds = array("Q")
            path = self._part(part)
            if path.exists():
                bonds.frombytes(path.read_bytes())
                path.unlink()
            bonds.extend(buffer)
            first: dict[int, int] = {}
            for index in range(0, len(bonds), 2):
                number = bonds[index + 1]
                other = first.setdefault(bonds[index], number)
                if other != number:
                    lower, higher = sorted((self._root(other), self._root(number)))
                    self._parents[higher] = lower
        self._buffers = [array("Q") for _ in range(_PARTS)]

    def _root(self, number: int) -> int:
        parents = self._parents
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number


def once_more(ranks: dict[int, int], weight: float) -> set[int]:
    """The records that are repeated once more than floor(weight) times: the fraction of them, by their ranks."""
    ranked = sorted(ranks, key=ranks.__getitem__)
    return set(ranked[: round((weight - math.floor(weight)) * len(ranked))])
