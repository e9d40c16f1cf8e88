"""Turn raw files (chats, scripts, plays, character cards, tables, articles, instruction data) into training data.

    python convert_dataset.py play.txt --character ROMEO --output data/romeo
    python convert_dataset.py chats/ --character 芽衣 --system "你是{character}。" --output data/mei --preview 3
    python convert_dataset.py --from data/mei/report.json --output data/mei2 --seed 1

DIR gets train.jsonl, val.jsonl, report.html (what the data is like, with advice), report.json (what became of
everything) and rejected.jsonl (what could not be used, and how to fix it).
"""

import argparse

from persona.console import run_script


def parse_arguments() -> argparse.Namespace:
    from persona.convert.command import parser

    return parser(__doc__ or "").parse_args()


def tokenizer(model: str | None):
    from persona.config import load_config
    from persona.model.sources import CONFIG, load_offsets

    name = model or load_config(CONFIG, []).model.name_or_path
    return name, load_offsets(name)


def main() -> None:
    from persona.convert.command import command_of

    command = command_of(parse_arguments(), tokenizer)

    from persona.convert.pipeline import convert
    from persona.convert.report import describe, describe_check, next_steps, preview, verdict
    from persona.errors import DataError

    if command.check:
        print(describe_check(command.inputs, command.options))
        return
    shown = command.preview or 0
    names = {name for name, _ in command.earlier}
    conversion = convert(command.inputs, command.options, command.output, shown, names)
    if shown:
        print(preview(conversion.records, conversion.report.counts.written))
    print(describe(conversion.report, conversion.rejections))
    if note := command.changes(conversion.report.files):
        print(note)
    listed = ", ".join(conversion.written)
    print(f"written to {command.output}: {listed}" if listed else "preview: nothing was written")
    if failure := verdict(conversion.report.counts, command.options.max_reject):
        raise DataError(failure)
    if command.output:
        print(next_steps(conversion.report, command.output))


if __name__ == "__main__":
    run_script(main)
