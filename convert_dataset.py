"""Turn raw files (chats, scripts, plays, instruction data) into training conversations.

    python convert_dataset.py play.txt --character ROMEO --output data/romeo
    python convert_dataset.py chats/ --character 芽衣 --system "你是{character}。" --output data/mei --preview 3

DIR gets train.jsonl, val.jsonl, report.json (what happened to every record) and rejected.jsonl (what to mend, and how).
"""

import argparse
from pathlib import Path

from persona.console import run_script


def parse_arguments() -> argparse.Namespace:
    from persona.convert.formats import NAMES
    from persona.convert.options import Options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="files, or folders that are read with all they hold")
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder for the results")
    parser.add_argument(
        "--character",
        metavar="NAME",
        action="append",
        default=[],
        help="whose lines are learned; repeat it for other names of the same character",
    )
    system_help = "system prompt for records that have none; {character} is filled in"
    parser.add_argument("--system", metavar="TEXT|@FILE", help=system_help)
    parser.add_argument("--format", choices=NAMES, help="the format of all inputs, instead of deciding by content")
    parser.add_argument(
        "--val-ratio", type=float, default=Options.val_ratio, help="share of groups held out (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=Options.seed, help="of split and order (%(default)s)")
    parser.add_argument(
        "--context-turns",
        type=int,
        default=Options.context_turns,
        help="dialogue: at most so many lines before a reply (%(default)s)",
    )
    parser.add_argument(
        "--max-exchanges",
        type=int,
        default=Options.max_exchanges,
        help="dialogue: longer scenes are cut into several records (%(default)s)",
    )
    parser.add_argument(
        "--max-reject", type=float, default=Options.max_reject, help="fail above this share of rejections (%(default)s)"
    )
    parser.add_argument("--preview", metavar="N", type=int, help="show the first N records and write nothing")
    return parser.parse_args()


def main() -> None:
    from persona.convert.options import Options, checked
    from persona.convert.pipeline import check_output, convert_files, write_conversion
    from persona.convert.report import describe, next_command, preview, verdict
    from persona.convert.sources import find_sources
    from persona.errors import DataError, UsageError

    arguments = vars(parse_arguments())
    inputs, output, shown = (arguments.pop(name) for name in ("inputs", "output", "preview"))
    options = checked(Options(characters=tuple(arguments.pop("character")), **arguments))
    if output is None and shown is None:
        raise UsageError("Give --output DIR for the results, or --preview N to look first.")
    if shown is not None and shown < 1:
        raise UsageError(f"--preview {shown}: give the number of records to show, as 3.")
    sources, skipped = find_sources(inputs)
    if shown is None:
        check_output(output, sources)
    conversion = convert_files(sources, options, skipped)
    report = conversion.report
    if shown is not None:
        print(preview(conversion.records, shown))
    written = [] if shown is not None else write_conversion(conversion, output)
    print(describe(report, conversion.rejections))
    print(f"written to {output}: {', '.join(written)}" if written else "preview: nothing was written")
    if failure := verdict(report, options.max_reject):
        raise DataError(failure)
    if written:
        print(f"next:\n  {next_command(report, output)}")


if __name__ == "__main__":
    run_script(main)
