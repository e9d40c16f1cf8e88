"""A conversion as the tests look at it: files in, and everything that was written read back."""

import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persona.convert.options import Options
from persona.convert.pipeline import convert
from persona.convert.report import Report
from persona.records import Record, check_messages

KEPT = 100_000


@dataclass
class Converted:
    """What a conversion left: records in the order of the input, the files' records, the refusals, report.json."""

    records: list[Record]
    train: list[Record]
    validation: list[Record]
    rejections: list[dict[str, Any]]
    report: dict[str, Any]
    outcome: Report
    shown: dict[str, Any]
    names: list[str]
    lore: list[Record] = field(default_factory=list)


def read_back(path):
    if not path.is_file():
        return []
    values = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    return [Record(tuple(value["messages"]), value["meta"]) for value in values]


def convert_paths(*inputs, output=None, tokenizer=None, **options):
    """The conversion of files and folders; whatever they hold, the account must be right.

    The options are not checked, so that small limits can be tried.
    """
    chosen = Options.model_construct(**options, load_tokenizer=tokenizer)
    with ExitStack() as stack:
        folder = Path(output or stack.enter_context(tempfile.TemporaryDirectory()))
        outcome = convert([str(path) for path in inputs], chosen, folder, KEPT)
        report = json.loads((folder / "report.json").read_text("utf-8"))
        done = Converted(
            outcome.records,
            read_back(folder / report["names"]["train"]),
            read_back(folder / report["names"]["val"]),
            [json.loads(line) for line in (folder / "rejected.jsonl").read_bytes().split(b"\n") if line],
            report,
            outcome.report,
            outcome.rejections,
            outcome.written,
            read_back(folder / "lore.jsonl") if "lore.jsonl" in outcome.written else [],
        )
        assert (folder / "report.html").read_text("utf-8").startswith("<!DOCTYPE html>")
        assert not [path for path in folder.iterdir() if path.name.startswith(".")], "nothing temporary is left"
    check_account(done)
    return done


def check_account(done):
    report = done.report
    assert report["read"] == report["written"] + report["rejected"] + report["duplicates"]
    assert sum(entry["read"] for entry in report["files"]) == report["read"]
    assert report["written"] == len(done.records)
    assert (report["train"], report["val"]) == (len(done.train), len(done.validation))
    assert report["rejected"] == len(done.rejections) == sum(report["rejected_by_code"].values())
    for record in done.records:
        check_messages(record.messages)
    for rejection in done.rejections:
        assert rejection["code"]
        assert rejection["fix"]
        assert len(rejection["excerpt"]) <= 80
    if speeches := report["speeches"]:
        assert speeches["total"] == speeches["learned"] + speeches["context"] + sum(speeches["not_used"].values())
    replies = {" ".join(m["content"].split()) for r in done.validation for m in r.messages if m["role"] == "assistant"}
    for record in (*done.train, *done.lore):
        for message in record.messages:
            assert message["role"] != "assistant" or " ".join(message["content"].split()) not in replies
    groups = [{json.dumps(record.meta["group"]) for record in side} for side in (done.train, done.validation)]
    assert groups[0].isdisjoint(groups[1])


def convert_data(data, name="in.txt", **options):
    """The conversion of one file with this content: bytes, a text, or a value that is written as JSON."""
    if not isinstance(data, bytes):
        data = (data if isinstance(data, str) else json.dumps(data)).encode("utf-8", "surrogatepass")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        return convert_paths(path, **options)
