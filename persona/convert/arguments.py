"""The command line of convert_dataset.py: its flags by what they are about, and the options they make."""

import argparse
from pathlib import Path

from persona.convert import options as choices
from persona.convert.formats import NAMES
from persona.convert.options import Options, checked

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
    group.add_argument(
        "--drop-lines", metavar="KINDS", type=choices.parse_line_kinds, default=_D.drop_lines, help=kinds
    )
    titles = "a title that is background, besides 角色故事1, 更多描述, 角色详细, 神之眼; repeatable"
    group.add_argument("--background", metavar="TITLE", action="append", default=[], help=titles)
    group.add_argument("--settings", action="store_true", dest="settings_apart", help="settings go to settings.jsonl")
    times = "how many times a setting stands in the training part (%(default)g)"
    group.add_argument("--settings-weight", metavar="N", type=float, default=_D.settings_weight, help=times)


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
    group.add_argument("--role-map", metavar="JSON", type=choices.parse_role_map, default={}, help=roles)
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
    parse = choices.parse_templates
    group.add_argument("--templates", metavar="LIST", type=parse, default=dict(choices.TEMPLATES), help=templates)
    group.add_argument("--author-prompt", metavar="TEXT", default=_D.author_prompt, help="system prompt (%(default)s)")
    tokens = "length of a chunk (300-800)"
    group.add_argument("--chunk-tokens", metavar="N-M", type=choices.parse_range, default=_D.chunk_tokens, help=tokens)
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
