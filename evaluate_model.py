"""Measure a tuned model: does it sound like them, does it remember, does it still think.

    python evaluate_model.py report outputs/tamsin           everything, as a page and as JSON
    python evaluate_model.py score outputs/tamsin            perplexity of base and tuned on held-out conversations
    python evaluate_model.py score outputs/one outputs/two   each model on each one's held-out file
    python evaluate_model.py predict outputs/tamsin          replies to the held-out prompts, and their figures
    python evaluate_model.py style replies.txt --data val.jsonl   how near to the author any texts are
    python evaluate_model.py ab-make outputs/tamsin          a blind sheet for readers, from the predictions
    python evaluate_model.py ab-score answers.json outputs/tamsin/ab_key.json

Base and tuned model are one model with its adapter switched off and on. Nothing leaves this computer.
"""

import argparse
from pathlib import Path

from persona.console import run_script
from persona.errors import UsageError

VERBS = ("score", "predict", "style", "report", "ab-make", "ab-score")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="run, adapter, merged model, or a file of texts (default: the run)"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="held-out conversations (default: the run's own)")
    parser.add_argument(
        "--control", action="append", default=[], type=Path, metavar="FILE", help="neutral text; may be repeated"
    )
    parser.add_argument("--base-texts", type=Path, metavar="FILE", help="what the base wrote, for a file of texts")
    parser.add_argument("--limit", type=int, metavar="N", help="style and settings on N prompts drawn by the seed")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="replies at a time (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where files go (default: the run's folder)")
    parser.add_argument("--config", type=Path, help="settings (default: the run's own, else config/default.json)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one setting")
    parser.add_argument("--load-in-4bit", action="store_true", help="hold a merged model in 4 bits")
    return parser.parse_args()


def compare_blindly(args: argparse.Namespace) -> None:
    from persona.evaluate.blind import command
    from persona.evaluate.subject import read_subject

    paths = list(map(Path, args.paths))
    if args.verb == "ab-score":
        command.score_answers(paths, print)
    elif len(paths) == 2:
        command.sheet_of_files(*paths, args.output or paths[0].parent, args.limit, print)
    elif len(paths) < 2:
        subject = read_subject(args.paths[0] if paths else None, args.config, args.set, args.data, args.output)
        command.sheet_of_run(subject, args.limit, print)
    else:
        raise UsageError("ab-make takes a run, or two files of predictions.")


def main() -> None:
    args = parse_arguments()
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise UsageError("--batch-size and --limit are numbers from 1.")
    if args.verb in ("ab-make", "ab-score"):
        compare_blindly(args)
        return
    if len(args.paths) > 1 and args.verb != "score":
        raise UsageError(f"{args.verb} takes one PATH, found {len(args.paths)}; only score compares several models.")

    from persona.evaluate.subject import read_controls, read_subject

    subjects = [
        read_subject(path, args.config, args.set, args.data, args.output, args.base_texts)
        for path in args.paths or [None]
    ]
    controls = read_controls(args.control)
    for note in dict.fromkeys(note for subject in subjects for note in subject.notes):
        print(f"  note: {note}")

    from persona.evaluate import command
    from persona.model.loading import enough_memory

    advice = "Lower --batch-size and evaluation.max_tokens_per_pack, or take a smaller model."
    with enough_memory(advice):
        if args.verb == "score":
            command.run_score(subjects, controls, args.load_in_4bit, print)
        elif args.verb == "predict":
            command.run_predict(subjects[0], args.load_in_4bit, args.batch_size, print)
        elif args.verb == "style":
            command.run_style(subjects[0], args.load_in_4bit, args.batch_size, args.limit, print)
        else:
            command.run_report(subjects[0], controls, args.load_in_4bit, args.batch_size, args.limit, print)


if __name__ == "__main__":
    run_script(main)
