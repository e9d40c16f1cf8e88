"""The account of a conversion: every draft becomes a record, a rejection or a duplicate, and nothing else."""

import json
import math
from collections import Counter, defaultdict
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

from persona.convert.cleaning import conversation_key, fold_conversation, refine, replies_of
from persona.convert.draft import Draft, Rejection, reject
from persona.convert.inputs import Source
from persona.convert.options import Options
from persona.convert.output import Shuffle, Staged
from persona.convert.split import Seen, Split, fingerprint, once_more
from persona.records import Record, RecordFault, check_messages, check_type, rank

TRAIN, VALIDATION, LORE = "train.jsonl", "val.jsonl", "lore.jsonl"
REPORT, REJECTED, PAGE = "report.json", "rejected.jsonl", "report.html"
SAMPLED = 2000  # records that the data report measures; fewer are measured whole
_SHOWN = 3  # rejections kept of each code for the terminal


class Account:
    """What has become of the drafts so far; memory grows by some thirty bytes a record."""

    def __init__(self, options: Options, staged: Staged, folder: Path, keep: int) -> None:
        self.options, self.staged, self.keep = options, staged, keep
        self.outcome: Counter[str] = Counter()  # read, written, rejected, duplicates, repaired
        self.repairs: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.roles: Counter[str] = Counter()  # those that are not known
        self.speeches: Counter[str] = Counter()
        self.not_used: Counter[str] = Counter()
        self.first: list[Record] = []
        self.system_prompt: str | None = None  # of a character card
        self.names = {TRAIN: TRAIN, VALIDATION: VALIDATION, LORE: LORE}
        self.shown: dict[str, list[Rejection]] = defaultdict(list)
        self._seen, self._split, self._shuffle = Seen(), Split(folder), Shuffle(folder)
        self._weighted: dict[int, int] = {}  # number: rank, of lore made here
        self._repeated: dict[str, int] = {}  # key: number, of lore that comes as records of ours
        self._copies: Counter[int] = Counter()
        self._lore: set[int] = set()  # numbers
        staged.open(REJECTED)

    def settle(self, draft: Draft, source: Source, number: int) -> None:
        """The draft, the file's `number`-th, becomes records, rejections or duplicates."""
        for part in refine(draft, self.options):
            self.outcome["read"] += 1
            try:
                record = self._record(part, source, number)
                line = record.encoded()
            except RecordFault as fault:
                self._reject(part, source, fault)
            else:
                self._keep(record, line, part)

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
            made = {"source": source.name, "group": f"{source.label}#{draft.group or number}", "type": "dialogue"}
            if self.options.characters:
                made["character"] = self.options.characters[0]
            meta = made | meta
        return Record(tuple(messages) if draft.plain else check_messages(messages), meta)

    def _reject(self, draft: Draft, source: Source, fault: RecordFault) -> None:
        rejection = reject(source.name, draft, fault)
        self.outcome["rejected"] += 1
        self.codes[fault.code] += 1
        if fault.code == "UNKNOWN_ROLE":
            self.roles[fault.reason.removeprefix("found the role ")] += 1
        self.staged.write_line(REJECTED, rejection.to_json().encode("utf-8"))
        if len(self.shown[fault.code]) < _SHOWN:
            self.shown[fault.code].append(rejection)
        self.not_used["in a rejected conversation"] += draft.learned + draft.context

    def _keep(self, record: Record, line: bytes, draft: Draft) -> None:
        folded = fold_conversation(record.messages, draft.plain)
        key = conversation_key(folded)
        is_lore = str(record.meta["type"]).startswith("lore_")
        if not self._seen.add(int(key[:16], 16)) and not self.options.keep_dups:
            self.outcome["duplicates"] += 1
            self.not_used["in a duplicate conversation"] += draft.learned + draft.context
            if is_lore and not draft.fresh and key in self._repeated:
                self._again(key, line)
            return
        place = rank(self.options.seed, key)[:16]
        number = self._divide(record, draft, folded, is_lore and self.options.lore_apart)
        self._shuffle.add(place, number, 0, line)
        if is_lore:
            self._repeat(key, number, place, line, draft.fresh)
        self.outcome["written"] += 1
        self.kinds[str(record.meta["type"])] += 1
        if draft.repairs:
            self.repairs.update(draft.repairs)
            self.outcome["repaired"] += bool(+draft.repairs)
        self.speeches["learned"] += draft.learned
        self.speeches["context"] += draft.context
        if len(self.first) < self.keep:
            self.first.append(record)

    def _divide(self, record: Record, draft: Draft, folded: str, pinned: bool) -> int:
        """The number of the record, after its group and its replies are entered as what holds records together."""
        name = record.meta["group"]
        group = encode_basestring_ascii(name) if isinstance(name, str) else json.dumps(name, sort_keys=True)
        bonds = [fingerprint(reply) for reply in replies_of(folded)]
        if draft.group or draft.part or "group" in draft.meta:  # else it is a group by itself
            bonds.append(fingerprint(f"group {group}"))
        return self._split.add(int(rank(self.options.seed, group)[:16], 16), bonds, pinned)

    def _repeat(self, key: str, number: int, place: str, line: bytes, fresh: bool) -> None:
        """Enter the repetitions of a setting: by the weight if it was made here, else as the input repeats it."""
        self._lore.add(number)
        if not fresh:
            self._repeated[key] = number
            return
        self._weighted[number] = int(place, 16)
        if not self.options.lore_apart:
            for copy in range(1, math.ceil(self.options.lore_weight)):
                self._shuffle.add(rank(self.options.seed, f"{key}#{copy}")[:16], number, copy, line)

    def _again(self, key: str, line: bytes) -> None:
        number = self._repeated[key]
        self._copies[number] += 1
        copy = self._copies[number]
        self._shuffle.add(rank(self.options.seed, f"{key}#{copy}")[:16], number, copy, line)

    def close(self) -> None:
        """Let go of the files that hold the records on their way."""
        self._shuffle.close()

    def finish(self) -> tuple[Counter[str], list[dict[str, Any]]]:
        """Write the records in their final order; the lines of each file, and a random sample of records."""
        held_out = self._split.held_out(self.options.ratio)
        lines: Counter[str] = Counter()
        sample: list[dict[str, Any]] = []
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
            self.staged.write_line(self.names[name], line)
            lines[name] += 1
            if not copy and len(sample) < SAMPLED:
                sample.append(json.loads(line))
        outcome = self.outcome
        assert outcome["read"] == outcome["written"] + outcome["rejected"] + outcome["duplicates"]
        return lines, sample
