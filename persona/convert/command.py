"""The command line of convert_dataset.py: its flags by what they are about, and the options they make."""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from persona.convert import options as choices
from persona.convert.cleaning import clean_text
from persona.convert.formats.recognise import NAMES
from persona.convert.inputs import probe, read_text
from persona.convert.options import LINE_KINDS, TEMPLATES, Options
from persona.errors import UsageError
from persona.records import RecordFault

_BOUNDS: dict[str, tuple[float, float, str]] = {
    "val_ratio": (0, 0.999999, "a share of at least 0 and less than 1, as 0.1"),
    "max_reject": (0, 1, "a share from 0 to 1, as 0.05"),
    "context_turns": (1, 1000, "a number of at least 1"),
    "max_exchanges": (1, 100_000, "a number of at least 1"),
    "max_gap": (0.001, 1e9, "a number of minutes above 0"),
    "max_record": (0.001, 1000, "a number of millions of characters, from 0.001 to 1000"),
    "max_chars": (100, 1e9, "a number of characters of at least 100"),
    "min_chars": (0, 1e6, "a number of characters of at least 0"),
    "lore_weight": (1, 100, "a number from 1 to 100, as 5 or 2.5"),
}


def checked(options: Options) -> Options:
    """The options with the system prompt read, filled in and cleaned; a UsageError names what is out of bounds."""
    for name, (low, high, wanted) in _BOUNDS.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"{_flag(name)} {value:g}: give {wanted}.")
    for name in (*options.characters, *([options.user_name] if options.user_name is not None else [])):
        if not name.strip():
            raise UsageError("--character or --user-name is empty. Give the name as it stands in the file.")
    low, high = options.chunk_tokens
    if not 20 <= low < high:
        raise UsageError(
            f"--chunk-tokens {low}-{high}: give two numbers of at least 20, the smaller first, as 300-800."
        )
    return replace(options, system=_system_prompt(options)) if options.system is not None else options


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_role_map(text: str) -> dict[str, str]:
    """{"甄嬛": "assistant"} as it stands on the command line; a UsageError for anything else."""
    fix = f"""--role-map {text}: write JSON such as '{{"甄嬛": "assistant", "皇上": "user"}}'."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(fix) from None
    if not isinstance(value, dict) or not set(map(str, value.values())) <= {"system", "user", "assistant", "tool"}:
        raise UsageError(f"{fix} The values are system, user, assistant or tool.")
    return {key.strip().casefold(): role for key, role in value.items()}


def parse_templates(text: str) -> dict[str, float]:
    """continue=1,expand=0.5 as weights of the templates of articles; those not named are off."""
    weights = dict.fromkeys(TEMPLATES, 0.0)
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = -1.0
        if name not in TEMPLATES or not 0 <= weights[name] <= 1:
            raise UsageError(f"--templates {text}: write for example continue=1,expand=0.5,rewrite=0 (weights 0 to 1).")
    return weights


def parse_range(text: str) -> tuple[int, int]:
    """300-800 as two numbers."""
    low, _, high = text.partition("-")
    if not (low.isdecimal() and high.isdecimal() and len(text) < 20):
        raise UsageError(f"--chunk-tokens {text}: write two numbers, as 300-800.")
    return int(low), int(high)


def parse_line_kinds(text: str) -> tuple[str, ...]:
    """notes,silence as names of kinds of lines; none for none."""
    names = tuple(part.strip() for part in text.split(",") if part.strip() and part.strip() != "none")
    if unknown := [name for name in names if name not in LINE_KINDS]:
        raise UsageError(f"--drop-lines {text}: {unknown[0]} is not one of {', '.join(LINE_KINDS)}, none.")
    return names


def _system_prompt(options: Options) -> str:
    text = options.system or ""
    if text.startswith("@"):
        path = Path(text[1:]).expanduser()
        if not path.is_file():
            raise UsageError(f"--system {text}: {path} does not exist. Name a text file, or give the text itself.")
        text = read_text(path, str(path), probe(path, str(path)))
    if "{character}" in text:
        if not options.characters:
            raise UsageError("--system holds {character}: add --character NAME to fill it in.")
        text = text.replace("{character}", options.characters[0])
    try:
        text = clean_text(text, "--system", Counter())
    except RecordFault as fault:
        raise UsageError(f"--system: {fault.reason}. {fault.fix}.") from None
    if not text:
        raise UsageError("--system is empty. Give the text, or leave the flag out.")
    return text


_D = Options()


def parser(description: str) -> argparse.ArgumentParser:
    """The parser with all flags."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("inputs", metavar="INPUT", nargs="+", help="files, or folders that are read with all they hold")
    made.add_argument("--output", metavar="DIR", type=Path, help="folder for the results")
    made.add_argument("--preview", metavar="N", type=int, help="show the first N records and write nothing")
    made.add_argument("--check", action="store_true", help="report on converted files, and write nothing")
    made.add_argument("--format", choices=NAMES, help="the format of all inputs, instead of deciding by content")
    made.add_argument("--encoding", help="of all inputs, as gb18030 or big5, instead of finding it out")
    made.add_argument("--system", metavar="TEXT|@FILE", help="system prompt; {character} is filled in")
    made.add_argument("--seed", type=int, default=_D.seed, help="of split and order (%(default)s)")
    ratio = f"share of the records held out ({Options.DEFAULT_RATIO})"
    made.add_argument("--val-ratio", metavar="SHARE", type=float, help=ratio)
    _speakers(made.add_argument_group("named speakers: dialogues, plays, chats, character lines"))
    _tables(made.add_argument_group("tables"))
    _repairs(made.add_argument_group("what to mend, drop or refuse"))
    _articles(made.add_argument_group("articles"))
    return made


def _speakers(group: argparse._ArgumentGroup) -> None:
    whose = "whose lines are learned; repeat it for other names of the same character"
    group.add_argument("--character", metavar="NAME", action="append", default=[], dest="characters", help=whose)
    group.add_argument(
        "--user-name", metavar="NAME", help="what {{user}} is called; in WeChat exports, what you are called"
    )
    before = "at most so many lines before a reply (%(default)s)"
    group.add_argument("--context-turns", metavar="N", type=int, default=_D.context_turns, help=before)
    cut = "longer scenes are cut into several records (%(default)s)"
    group.add_argument("--max-exchanges", metavar="N", type=int, default=_D.max_exchanges, help=cut)
    told = "lines of the narrator: left out, in the system prompt, or in brackets (%(default)s)"
    group.add_argument("--narration", choices=("drop", "system", "brackets"), default=_D.narration, help=told)
    group.add_argument("--keep-quotes", action="store_true", help="keep 「」 and “” around a whole speech")
    group.add_argument("--strip-speaker", action="store_true", help="remove NAME: at the beginning of a message")
    group.add_argument("--flat", action="store_true", help="lines belong to the one before at most, not to a scene")
    gap = "a longer pause ends a conversation of a chat (%(default)s minutes)"
    group.add_argument("--max-gap", metavar="MINUTES", type=float, default=_D.max_gap, help=gap)
    kinds = f"lines of character files that are left out: {', '.join(choices.LINE_KINDS)}, none (notes,silence,marks)"
    group.add_argument("--drop-lines", metavar="KINDS", type=parse_line_kinds, default=_D.drop_lines, help=kinds)
    titles = "a title that is background, besides 角色故事1, 更多描述, 角色详细, 神之眼; repeatable"
    group.add_argument("--background", metavar="TITLE", action="append", default=[], help=titles)
    group.add_argument("--lore", action="store_true", dest="lore_apart", help="lore goes to lore.jsonl")
    for old, new in (("--settings", "--lore"), ("--settings-weight", "--lore-weight")):
        group.add_argument(
            old, nargs="?", type=_renamed(old, new), const=new, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    times = "how many times each lore record is in the training part (%(default)g)"
    group.add_argument("--lore-weight", metavar="N", type=float, default=_D.lore_weight, help=times)


def _renamed(old: str, new: str) -> Callable[[str], str]:
    def refuse(_: str) -> str:
        raise UsageError(f"{old} is {new} now; write that instead.")

    return refuse


def _tables(group: argparse._ArgumentGroup) -> None:
    for what in ("prompt", "response", "context"):
        group.add_argument(f"--{what}-col", metavar="NAME", help=f"the column of the {what}")
    group.add_argument("--split", metavar="NAME", help='only the rows of this split, as "train"')


def _repairs(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lenient", action="store_true", help="read broken JSON, join turns; list each repair")
    group.add_argument("--redact", action="store_true", help="mask phone, e-mail, identity and card numbers, and keys")
    group.add_argument("--fix-text", action="store_true", help="mend UTF-8 that was read in another encoding (Ã©, 鈥)")
    joined = "join turns of one role running instead of refusing the record"
    group.add_argument("--merge-consecutive", action="store_true", help=joined)
    first = "a reply with no question before it (%(default)s)"
    group.add_argument("--leading-assistant", choices=("drop", "keep"), default=_D.leading_assistant, help=first)
    group.add_argument("--allow-empty-user", action="store_true", help="fill in empty questions instead of refusing")
    tools = "records with calls of tools: refused, or kept without these exchanges (%(default)s)"
    group.add_argument("--tools", choices=("reject", "drop"), default=_D.tools, help=tools)
    roles = """who else speaks in ShareGPT and messages, as '{"甄嬛": "assistant"}'"""
    group.add_argument("--role-map", metavar="JSON", type=parse_role_map, default={}, help=roles)
    long = "records with a turn above --max-chars: refused, cut before it, or split around it (%(default)s)"
    group.add_argument("--too-long", choices=("reject", "truncate", "split"), default=_D.too_long, help=long)
    group.add_argument("--max-chars", metavar="N", type=int, default=_D.max_chars, help="longest turn (%(default)s)")
    group.add_argument("--min-chars", metavar="N", type=int, default=_D.min_chars, help="shortest reply (%(default)s)")
    group.add_argument("--keep-dups", action="store_true", help="keep exact duplicates")
    share = "fail above this share of rejections (%(default)s)"
    group.add_argument("--max-reject", metavar="SHARE", type=float, default=_D.max_reject, help=share)
    largest = "longest record of a file in millions of characters (%(default)g)"
    group.add_argument("--max-record", metavar="N", type=float, default=_D.max_record, help=largest)


def _articles(group: argparse._ArgumentGroup) -> None:
    templates = "which are asked, and for which share of the chunks (continue=1,expand=1,rewrite=1)"
    parse = parse_templates
    group.add_argument("--templates", metavar="LIST", type=parse, default=dict(choices.TEMPLATES), help=templates)
    group.add_argument("--author-prompt", metavar="TEXT", default=_D.author_prompt, help="system prompt (%(default)s)")
    tokens = "length of a chunk (300-800)"
    group.add_argument("--chunk-tokens", metavar="N-M", type=parse_range, default=_D.chunk_tokens, help=tokens)
    model = (
        "model whose tokens are counted; without it, the model of config/default.json, fetched when there are articles"
    )
    group.add_argument("--tokenizer", metavar="MODEL", dest="tokenizer_of", help=model)


def options_of(arguments: argparse.Namespace, tokenizer: choices.Tokenizer) -> Options:
    """The options that the arguments name; a UsageError says what is out of bounds."""
    values = vars(arguments).copy()
    for name in ("inputs", "output", "preview", "check"):
        values.pop(name)
    model = values.pop("tokenizer_of")
    values["characters"] = tuple(values["characters"])
    values["background"] = tuple(values["background"])
    return checked(Options(**values, tokenizer=lambda: tokenizer(model), tokenizer_is_local=model is not None))
