"""report.html: the data report as one self-contained page, without scripts and without anything from elsewhere."""

from html import escape
from typing import Any

from persona.pages import document

_EXAMPLES = 5
_LONGEST = 600  # characters of an example's message


def page(report: dict[str, Any], examples: list[dict[str, Any]]) -> str:
    """The page as text; `examples` are records."""
    statistics = report["statistics"]
    parts = [
        "<h1>Data report</h1>",
        _sentence(report),
        _section("Advice", _advice(report["warnings"])),
        _section("Files", _files(report["files"])),
        _section("Skipped", _list(report["skipped"])),
        _section("Records", _outcome(report)),
    ]
    if statistics["measured"]:
        parts += [
            _section(
                f"Length of records in tokens ({statistics['tokens_by']})", _histogram(statistics["record_tokens"])
            ),
            _section("Length of replies in tokens", _histogram(statistics["reply_tokens"])),
            _section("Exchanges in a record", _bars(statistics["exchanges"])),
            _section("Languages of the replies", _bars(statistics["languages"])),
            _section("Speakers", _bars(report["speakers"])),
            _section("Where the speeches went", _bars(_speeches(report["speeches"]))),
            _section("The same prompt more than once", _bars(dict(map(tuple, statistics["same_prompts"])))),
            _section("Noticed in records", _bars(_noticed(statistics))),
            _section("Personal data", _bars(statistics["personal_data"])),
        ]
    parts += [
        _section("Repaired", _bars(report["repairs"])),
        _section("Rejected, by reason", _bars(report["rejected_by_code"])),
        _section("Roles that are not known", _bars(report["unknown_roles"])),
        _section(
            "System prompt",
            f'<div class="said">{escape(report["system_prompt"] or "")}</div>' * bool(report["system_prompt"]),
        ),
        _section("Examples", "".join(_example(record) for record in examples[:_EXAMPLES])),
    ]
    return document("Data report", "\n".join(part for part in parts if part))


def _advice(lines: list[str]) -> str:
    if not lines:
        return "<p>Nothing was noticed that would hurt training.</p>"
    return "".join(f'<div class="warn">{escape(line)}</div>' for line in lines)


def _said(text: str | None) -> str:
    return f'<div class="said">{escape(text)}</div>' if text else ""


def _sentence(report: dict[str, Any]) -> str:
    outcome = " + ".join(f"{report[name]:,} {name}" for name in ("written", "rejected", "duplicates"))
    measured, total = report["statistics"]["measured"], report["statistics"]["of"]
    sampled = (
        f" The measures below are of a random sample of {measured:,} of {total:,} records." if measured < total else ""
    )
    return (
        f"<p>{report['read']:,} records read = {outcome}. Training {report['train']:,}, validation {report['val']:,}."
        f"{sampled}</p>"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _files(entries: list[dict[str, Any]]) -> str:
    rows = []
    for entry in entries:
        formats = ", ".join(f"{name} {count:,}" for name, count in entry["formats"].items())
        notes = "".join(f"<br>{escape(note)}" for note in entry["notes"])
        cells = "".join(f'<td class="n">{entry[name]:,}</td>' for name in ("read", "written", "rejected", "duplicates"))
        why = f"{escape(entry['why'])} ({escape(entry['encoding'])}){notes}"
        rows.append(f"<tr><td>{escape(entry['file'])}</td><td>{escape(formats)}</td><td>{why}</td>{cells}</tr>")
    head = "".join(
        f"<th>{name}</th>" for name in ("file", "format", "why", "read", "written", "rejected", "duplicates")
    )
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _outcome(report: dict[str, Any]) -> str:
    counts = {name: report[name] for name in ("written", "rejected", "duplicates", "repaired")}
    return _bars(counts | {f"kind: {name}": count for name, count in report["kinds"].items()})


def _speeches(speeches: dict[str, Any] | None) -> dict[str, int]:
    if not speeches:
        return {}
    kept = {name: speeches[name] for name in ("learned", "context")}
    return kept | {f"not used: {reason}": count for reason, count in speeches["not_used"].items()}


def _noticed(statistics: dict[str, Any]) -> dict[str, int]:
    others = ("prompts_with_several_answers", "near_duplicates", "repeated_ids", "without_system")
    named = {name.replace("_", " "): statistics[name] for name in others if statistics[name]}
    return statistics["traits"] | named


def _histogram(distribution: dict[str, Any]) -> str:
    bars = _bars({f"up to {bound:,}" if bound else "more": count for bound, count in distribution["histogram"]})
    numbers = ", ".join(f"{name} {distribution[name]:,}" for name in ("mean", "median", "p95", "longest"))
    return f"<p>{numbers}</p>{bars}"


def _bars(counts: dict[Any, int]) -> str:
    """A table of numbers with a bar each."""
    largest = max(counts.values(), default=0)
    rows = [
        f'<tr><td>{escape(str(name))}</td><td class="n">{count:,}</td>'
        f'<td style="width:50%"><span class="bar" style="width:{100 * count / max(1, largest):.1f}%"></span></td></tr>'
        for name, count in counts.items()
    ]
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _example(record: dict[str, Any]) -> str:
    said = []
    for message in record["messages"]:
        text = message["content"]
        shown = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
        role = escape(message["role"])
        said.append(f'<div class="said {role}"><span class="role">{role}</span>{escape(shown)}</div>')
    return f"<p>{escape(str(record['meta'].get('group', '')))}</p>{''.join(said)}"
