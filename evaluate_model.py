"""Measure a tuned model: does it sound like them, does it remember, does it still think.

    python evaluate_model.py report outputs/tamsin
    python evaluate_model.py score outputs/one outputs/two
    python evaluate_model.py style replies.txt --data val.jsonl
    python evaluate_model.py ab-score answers.json outputs/tamsin/ab_key.json

Base and tuned model are one model with its adapter switched off and on. Nothing leaves this computer.
"""

import argparse
from pathlib import Path

from persona.console import run_script

ABOUT = {
    "report": "perplexity, predictions, style, copying and memory of the lore, as a page and as JSON",
    "score": "perplexity of base and tuned model; of several models on each other's held-out files",
    "predict": "replies to the held-out prompts, and their figures",
    "style": "style of the model, or of any file of texts, compared with the author's",
    "ab-make": "a blind sheet for readers, from the predictions of a run or from two files of them",
    "ab-score": "the score of the readers' answers",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.epilog = "The options of a verb: python evaluate_model.py VERB --help"
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")
    for verb, about in ABOUT.items():
        add_arguments(verb, verbs.add_parser(verb, help=about, description=f"{about[0].upper()}{about[1:]}."))
    return parser.parse_args()


RUN = "training.output_dir of the settings"


def add_arguments(verb: str, parser: argparse.ArgumentParser) -> None:
    if verb == "ab-score":
        parser.add_argument(
            "answers",
            nargs="+",
            type=Path,
            metavar="ANSWERS",
            help="answers that readers saved from the sheet, one file each",
        )
        parser.add_argument(
            "key", type=Path, metavar="KEY", help="ab_key.json that ab-make wrote with the sheet, given last"
        )
        return
    target = "folder of a run, adapter, checkpoint or merged model"
    if verb not in ("score", "ab-make"):
        target += ", or file of replies to measure: predictions.json, or .txt with a reply a line in --data's order"
    if verb == "ab-make":
        parser.add_argument(
            "paths", nargs="*", metavar="PATH", help=f"folder of a run, or two predictions.json files (default: {RUN})"
        )
    elif verb == "score":
        parser.add_argument("paths", nargs="*", metavar="PATH", help=f"{target}; several are compared (default: {RUN})")
    else:
        parser.add_argument("paths", nargs="?", metavar="PATH", help=f"{target} (default: {RUN})")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="held-out conversations, e.g. val.jsonl (default: the run's)"
    )
    if verb in ("score", "report"):
        control = "conversations on which the model should not get worse: neutral, or another author's; may be repeated"
        parser.add_argument("--control", action="append", default=[], type=Path, metavar="FILE", help=control)
    if verb in ("predict", "style", "report"):
        base = "replies of the base model, in the same order and format, if PATH is a file of replies"
        parser.add_argument("--base-texts", type=Path, metavar="FILE", help=base)
        size = "replies generated at a time; fewer need less memory (default: 8)"
        parser.add_argument("--batch-size", type=positive, metavar="N", help=size)
    if verb in ("style", "report", "ab-make"):
        limit = {"style": "compare style on N conversations", "ab-make": "show N pairs of replies"}
        text = limit.get(verb, "compare style on N conversations and ask N questions about the lore")
        parser.add_argument("--limit", type=positive, metavar="N", help=f"{text}, drawn at random (default: all)")
    if verb not in ("score", "style"):
        other = "that of the first file" if verb == "ab-make" else "outputs/NAME-evaluation"
        folder = f"folder for the results (default: the run's, else {other})"
        parser.add_argument("--output", type=Path, metavar="DIR", help=folder)
    settings = "JSON file of settings (default: the run's own, else config/default.json)"
    parser.add_argument("--config", type=Path, metavar="FILE", help=settings)
    change = "change one setting, e.g. data.validation_file=val.jsonl; may be repeated"
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE", help=change
    )
    if verb != "ab-make":
        parser.add_argument(
            "--load-in-4bit", action="store_true", help="hold a merged model in 4 bits, to fit a small GPU"
        )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def main() -> None:
    args = vars(parse_arguments())
    verb = args.pop("verb")
    if verb == "ab-score":
        from persona.evaluate.blind.command import score_answers

        score_answers(**args, report=print)
    elif verb == "ab-make":
        from persona.evaluate.blind.command import compare_blindly

        compare_blindly(**args, report=print)
    else:
        from persona.evaluate.command import Request, evaluate

        evaluate(Request(verb, **args), print)


if __name__ == "__main__":
    run_script(main)
