"""The ledger of a conversion: what became of everything that was read.

Each conversation becomes a record, a rejection or a duplicate, and each speech is learned, context or not used.
"""

import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii
from pathlib import Path

from persona.convert.cleaning import conversation_key, fold_conversation, refine, replies_of
from persona.convert.draft import Draft, Rejection, reject
from persona.convert.inputs import Source
from persona.convert.options import Options
from persona.convert.output import Shuffle, Staged
from persona.convert.split import Seen, Split, fingerprint, once_more
from persona.files import JsonObject
from persona.records import Record, RecordFault, check_messages, check_type, rank

TRAIN, VALIDATION, LORE = "train.jsonl", "val.jsonl", "lore.jsonl"
REJECTED = "rejected.jsonl"
SAMPLED = 2000  # records that the data report measures; fewer are measured whole
_SHOWN = 3  # rejections kept of each code for the terminal


@dataclass
class Counts:
    """Counts of everything that was read, from one file or from all: conversations, speeches, repairs."""

    read: int = 0
    written: int = 0
    rejected: int = 0
    duplicates: int = 0
    repaired: int = 0
    speeches: int = 0
    learned: int = 0
    context: int = 0
    not_used: Counter[str] = field(default_factory=Counter)  # speeches, by reason
    formats: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)
    rejected_by_code: Counter[str] = field(default_factory=Counter)
    unknown_roles: Counter[str] = field(default_factory=Counter)
    other_splits: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, None] = field(default_factory=dict)  # why the formats were chosen
    system_prompt: str | None = None  # of a character card

    def __add__(self, other: "Counts") -> "Counts":
        mine, theirs = vars(self), vars(other)
        sums = {name: mine[name] + theirs[name] for name in mine if name not in ("reasons", "system_prompt")}
        prompt = other.system_prompt or self.system_prompt
        return Counts(**sums, reasons=self.reasons | other.reasons, system_prompt=prompt)

    def check(self) -> None:
        """Raise an AssertionError unless both sums are right."""
        assert self.read == self.written + self.rejected + self.duplicates, self
        assert not self.speeches or self.speeches == self.learned + self.context + self.not_used.total(), self

    def to_json(self) -> JsonObject:
        """The counts as report.json has them; "speeches" is null without named speakers."""
        numbers = {name: getattr(self, name) for name in ("read", "written", "rejected", "duplicates", "repaired")}
        tables = {name: getattr(self, name) for name in ("kinds", "repairs", "rejected_by_code")}
        speeches = {"total": self.speeches, "learned": self.learned, "context": self.context}
        return {
            **numbers,
            "formats": dict(self.formats),
            **{name: dict(sorted(table.items())) for name, table in tables.items()},
            "unknown_roles": dict(self.unknown_roles.most_common(20)),
            "speeches": {**speeches, "not_used": dict(+self.not_used)} if self.speeches else None,
        }


class Ledger:
    """The counts of each file, and the records on their way to the disk; memory grows by some thirty bytes a record."""

    def __init__(self, options: Options, staged: Staged, folder: Path, keep: int) -> None:
        self.options, self.staged, self.keep = options, staged, keep
        self.first: list[Record] = []
        self.shown: dict[str, list[Rejection]] = defaultdict(list)
        self._seen, self._split, self._shuffle = Seen(), Split(folder), Shuffle(folder)
        self._weighted: dict[int, int] = {}  # number: rank, of lore made here
        self._repeated: dict[str, int] = {}  # key: number, of lore that was a record of ours already
        self._copies: Counter[int] = Counter()
        self._lore: set[int] = set()  # numbers
        staged.open(REJECTED)

    def settle(self, draft: Draft, source: Source, number: int, counts: Counts) -> None:
        """Make records, rejections or duplicates of the draft, which is the `number`-th of its file."""
        for part in refine(draft, self.options):
            counts.read += 1
            try:
                record = self._record(part, source, number)
                line = record.encoded()
            except RecordFault as fault:
                self._reject(part, source, fault, counts)
            else:
                self._keep(record, line, part, counts)

    def _record(self, draft: Draft, source: Source, number: int) -> Record:
        if draft.fault:
            raise draft.fault
        check_type(draft.meta)
        messages = draft.messages
        if self.options.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.options.system}, *messages]
            draft.plain = False
        meta = draft.meta
        if not {"source", "group", "type"} <= meta.keys():
            own = {"source": source.name, "group": f"{source.label}#{draft.group or number}", "type": "dialogue"}
            if self.options.characters:
                own["character"] = self.options.characters[0]
            meta = own | meta
        return Record(tuple(messages) if draft.plain else check_messages(messages), meta)

    def _reject(self, draft: Draft, source: Source, fault: RecordFault, counts: Counts) -> None:
        rejection = reject(source.name, draft, fault)
        counts.rejected += 1
        counts.rejected_by_code[fault.code] += 1
        if fault.code == "UNKNOWN_ROLE":
            counts.unknown_roles[fault.reason.removeprefix("found the role ")] += 1
        counts.not_used["in a rejected conversation"] += draft.learned + draft.context
        self.staged.write_line(REJECTED, json.dumps(vars(rejection), ensure_ascii=False).encode("utf-8"))
        if len(self.shown[fault.code]) < _SHOWN:
            self.shown[fault.code].append(rejection)

    def _keep(self, record: Record, line: bytes, draft: Draft, counts: Counts) -> None:
        folded = fold_conversation(record.messages, draft.plain)
        key = conversation_key(folded)
        kind = str(record.meta["type"])
        is_lore = kind.startswith("lore_")
        if not self._seen.add(int(key[:16], 16)) and not self.options.keep_dups:
            counts.duplicates += 1
            counts.not_used["in a duplicate conversation"] += draft.learned + draft.context
            if is_lore and not draft.fresh and key in self._repeated:
                number = self._repeated[key]
                self._copies[number] += 1
                self._copy(key, number, self._copies[number], line)
            return
        place = rank(self.options.seed, key)[:16]
        number = self._divide(record, draft, folded, is_lore and self.options.lore_apart)
        self._shuffle.add(place, number, 0, line)
        if is_lore:
            self._repeat(key, number, place, line, draft.fresh)
        counts.written += 1
        counts.kinds[kind] += 1
        counts.learned += draft.learned
        counts.context += draft.context
        if draft.repairs:
            counts.repairs.update(draft.repairs)
            counts.repaired += bool(+draft.repairs)
        if len(self.first) < self.keep:
            self.first.append(record)

    def _divide(self, record: Record, draft: Draft, folded: str, pinned: bool) -> int:
        """The number of the record in the split, which keeps records of one group or one reply together."""
        name = record.meta["group"]
        group = encode_basestring_ascii(name) if isinstance(name, str) else json.dumps(name, sort_keys=True)
        bonds = [fingerprint(reply) for reply in replies_of(folded)]
        if draft.group or draft.part or "group" in draft.meta:  # else its group is it alone
            bonds.append(fingerprint(f"group {group}"))
        return self._split.add(int(rank(self.options.seed, group)[:16], 16), bonds, pinned)

    def _repeat(self, key: str, number: int, place: str, line: bytes, fresh: bool) -> None:
        """Add copies of a lore record: as many as its weight if it was made here; else the input holds them."""
        self._lore.add(number)
        if not fresh:
            self._repeated[key] = number
            return
        self._weighted[number] = int(place, 16)
        if not self.options.lore_apart:
            for copy in range(1, math.ceil(self.options.lore_weight)):
                self._copy(key, number, copy, line)

    def _copy(self, key: str, number: int, copy: int, line: bytes) -> None:
        self._shuffle.add(rank(self.options.seed, f"{key}#{copy}")[:16], number, copy, line)

    def close(self) -> None:
        """Close the files of records that are not written yet."""
        self._shuffle.close()

    def finish(self, names: dict[str, str]) -> tuple[Counter[str], list[Record]]:
        """Write the records in their final order; the lines of each file, and a random sample of records.

        `names` holds other names of the files, if they have some.
        """
        held_out = self._split.held_out(self.options.ratio)
        lines: Counter[str] = Counter()
        sample: list[Record] = []
        learned = {number: place for number, place in self._weighted.items() if not held_out[number]}
        extra = once_more(learned, self.options.lore_weight)
        floor = math.floor(self.options.lore_weight)
        for number, copy, line in self._shuffle.in_order():
            if number in self._lore and self.options.lore_apart:
                name = LORE
            else:
                name = VALIDATION if held_out[number] else TRAIN
            if copy and (held_out[number] or (number in self._weighted and copy >= floor + (number in extra))):
                continue
            self.staged.write_line(names.get(name, name), line)
            lines[name] += 1
            if not copy and len(sample) < SAMPLED:
                value = json.loads(line)
                sample.append(Record(tuple(value["messages"]), value["meta"]))
        return lines, sample
