"""Turn raw files (chats, scripts, plays, cards, tables, articles, instruction data) into training conversations.

    python convert_dataset.py play.txt --character ROMEO --output data/romeo
    python convert_dataset.py chats/ --character 芽衣 --system "你是{character}。" --output data/mei --preview 3

DIR gets train.jsonl, val.jsonl, report.html (what the data is like, with advice), report.json (what happened to every
record) and rejected.jsonl (what to mend, and how).
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
    import tempfile
    from pathlib import Path

    from persona.convert import pipeline, report
    from persona.convert.command import options_of
    from persona.convert.inputs import find_sources
    from persona.convert.output import Staged
    from persona.errors import DataError, UsageError

    arguments = parse_arguments()
    output, shown = arguments.output, arguments.preview
    options = options_of(arguments, tokenizer)
    if arguments.check:
        print(report.describe_check(arguments.inputs, options))
        return
    if output is None and shown is None:
        raise UsageError("Give --output DIR for the results, or --preview N to look first.")
    if shown is not None and shown < 1:
        raise UsageError(f"--preview {shown}: give the number of records to show, as 3.")
    sources, skipped = find_sources(arguments.inputs)
    if shown is None:
        pipeline.check_output(output, sources)
    with tempfile.TemporaryDirectory() as scratch, Staged(Path(scratch) if shown is not None else output) as staged:
        conversion = pipeline.convert_files(sources, options, skipped, staged, shown or 0)
        if shown is not None:
            print(report.preview(conversion.records, shown, conversion.report["written"]))
        written = [] if shown is not None else pipeline.publish(conversion, staged)
    print(report.describe(conversion.report, conversion.shown))
    print(f"written to {output}: {', '.join(written)}" if written else "preview: nothing was written")
    if failure := report.verdict(conversion.report, options.max_reject):
        raise DataError(failure)
    if written:
        if line := report.speaks_with(conversion.report):
            print(line)
        print(f"next:\n  {report.next_command(conversion.report, output)}")


if __name__ == "__main__":
    run_script(main)
