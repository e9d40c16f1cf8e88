"""The command line of convert_dataset.py, generated from the options, and the options that it chooses."""

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from persona.console import excerpt
from persona.convert.cleaning import clean_text
from persona.convert.formats.recognise import NAMES
from persona.convert.inputs import probe, read_text
from persona.convert.options import GROUPS, Flag, Options, Tokenize
from persona.convert.reading import Opened
from persona.errors import UsageError
from persona.files import JsonObject, read_json
from persona.records import RecordFault

RENAMED = {"--settings": "--lore", "--settings-weight": "--lore-weight"}
_NUMBERS = {int: "a whole number", float: "a number"}
_BOUNDS = {"ge": "of at least {}", "gt": "above {}", "le": "of at most {}", "lt": "below {}"}


def parser(description: str) -> argparse.ArgumentParser:
    """The parser of all flags; the values of options are texts, which `choose` checks."""
    flags = argparse.ArgumentParser(
        usage="%(prog)s INPUT [INPUT ...] --output DIR [option ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("inputs", metavar="INPUT", nargs="*", help="file, or folder with all its subfolders")
    flags.add_argument(
        "--output", metavar="DIR", type=Path, help="folder for the results; an earlier conversion in it is replaced"
    )
    flags.add_argument("--preview", metavar="N", type=int, help="print the first N converted records; write nothing")
    check = "report on INPUT, a train.jsonl or val.jsonl or their folder; write nothing"
    flags.add_argument("--check", action="store_true", help=check)
    again = (
        "repeat the conversion that wrote this report.json, from the same files and into its folder if no others are "
        "given; other options change it, e.g. --seed 1, or --no-flat after --flat"
    )
    flags.add_argument("--from", metavar="REPORT", type=Path, dest="repeated", help=again)
    for section in GROUPS:
        group = flags.add_argument_group(section.__doc__)
        for name in section.__annotations__:
            _add(group, name, Options.model_fields[name])
    for old, new in RENAMED.items():
        flags.add_argument(old, nargs="?", action=_Renamed, const=new, help=argparse.SUPPRESS)
    return flags


class _Renamed(argparse.Action):
    def __call__(self, *call: Any, **_: Any) -> None:
        raise UsageError(f"{call[-1]} is {self.const} now; write that instead.")


def _add(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    kind, words = _kind(field), (field.description or "").removesuffix(".")
    default = f" (default: {words_of})" if (words_of := _default(field)) else ""
    described = f"{words[0].lower()}{words[1:]}{default}".replace("%", "%%")
    if kind is bool:
        group.add_argument(_flag(name), action="store_true", default=None, dest=name, help=described)
        off = _flag(name).replace("--", "--no-", 1)
        group.add_argument(off, action="store_false", default=None, dest=name, help=argparse.SUPPRESS)
        return
    choices = NAMES if name == "format" else get_args(kind) if get_origin(kind) is Literal else None
    group.add_argument(
        _flag(name),
        dest=name,
        metavar=None if choices else _marker(field).metavar or "N",
        choices=choices,
        action="append" if field.default == () else "store",
        help=described,
    )


def _marker(field: FieldInfo) -> Flag:
    return next((mark for mark in field.metadata if isinstance(mark, Flag)), Flag())


def _flag(name: str) -> str:
    return _marker(Options.model_fields[name]).name or f"--{name.replace('_', '-')}"


def _kind(field: FieldInfo) -> Any:
    """The type of an option, without None."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    return kinds[0] if type(None) in get_args(field.annotation) else field.annotation


def _default(field: FieldInfo) -> str:
    """The default as it would be written on the command line."""
    value = field.default
    if _marker(field).default or value is None or value is False:
        return _marker(field).default or ""
    if isinstance(value, dict):
        return ",".join(f"{name}={weight:g}" for name, weight in value.items())
    return ",".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Command:
    """A command line: what to convert, how, and what to do with the result."""

    inputs: list[str]
    output: Path | None
    preview: int | None
    check: bool
    options: Options
    earlier: frozenset[tuple[str, str]] = frozenset()
    """Name and SHA-256 of each file of the conversion that is repeated with the same inputs."""

    def changes(self, files: Iterable[Opened]) -> str | None:
        """A note that names the files that are not those of the earlier conversion, or None."""
        names = dict(sorted(self.earlier ^ {(file.source.name, file.probed.digest) for file in files}))
        if not self.earlier or not names:
            return None
        return f"note: changed since the earlier conversion, so the result may differ: {excerpt(', '.join(names))}"


def command_of(arguments: argparse.Namespace, load: Callable[[str | None], tuple[str, Tokenize]]) -> Command:
    """The command that the arguments name; a UsageError says which flag is wrong, and what to write."""
    flags = {name: value for name, value in vars(arguments).items() if name in Options.model_fields}
    values = {name: _read(Options.model_fields[name], value) for name, value in flags.items() if value is not None}
    if "system" in values:
        values["system"] = _system_text(values["system"])
    inputs, output, earlier = arguments.inputs, arguments.output, frozenset[tuple[str, str]]()
    if arguments.repeated:
        saved_inputs, saved, saved_files = _saved(arguments.repeated)
        earlier = earlier if inputs else saved_files
        inputs, values, output = inputs or saved_inputs, saved | values, output or arguments.repeated.parent
    if not inputs:
        raise UsageError("Name the files or folders to convert, for example: play.txt --character ROMEO --output DIR")
    if output is None and arguments.preview is None and not arguments.check:
        raise UsageError("Give --output DIR for the results, or --preview N to look first.")
    if arguments.preview is not None and arguments.preview < 1:
        raise UsageError(f"--preview {arguments.preview}: give the number of records to show, for example 3.")
    if arguments.preview is not None and arguments.check:
        raise UsageError("--check shows no records, so --preview cannot be given with it. Leave one of them out.")
    options = choose(values)
    options = options.model_copy(update={"load_tokenizer": partial(load, options.tokenizer)})
    target = None if arguments.preview else output
    return Command(inputs, target, arguments.preview, arguments.check, options, earlier)


def _read(field: FieldInfo, text: Any) -> Any:
    """The number that a text names if the option is a number; else the text as it is."""
    kind = _kind(field)
    try:
        return kind(text) if kind in _NUMBERS else text
    except ValueError:
        return text


def _saved(path: Path) -> tuple[list[str], JsonObject, frozenset[tuple[str, str]]]:
    """The inputs and options that a report.json holds, and name and SHA-256 of each file."""
    report = read_json(path, "Give a report.json that convert_dataset.py has written.")
    try:
        inputs, options = [str(name) for name in report["inputs"]], dict(report["options"])
        return inputs, options, frozenset((str(file["file"]), str(file["sha256"])) for file in report.get("files", []))
    except (KeyError, TypeError, ValueError):
        fix = "Convert once more with flags instead of --from."
        raise UsageError(f"{path}: it does not say how it was made. {fix}") from None


def choose(values: Mapping[str, Any]) -> Options:
    """The options with these values; a UsageError names each wrong flag."""
    try:
        options = Options.model_validate(dict(values))
    except ValidationError as error:
        raise UsageError("\n".join(dict.fromkeys(map(_explain, error.errors())))) from None
    if options.format not in (None, *NAMES):
        raise UsageError(f"--format {options.format}: give one of {', '.join(NAMES)}.")
    return options if options.system is None else options.model_copy(update={"system": _system_prompt(options)})


def _explain(detail: ErrorDetails) -> str:
    name, value = str(detail["loc"][0]), detail["input"]
    if name not in Options.model_fields:
        return f"{name} is not an option of convert_dataset.py. Delete it from the file that --from names."
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    error = detail.get("ctx", {}).get("error")  # raised by a validator in `options`
    wanted = str(error) if error else _wanted(Options.model_fields[name])
    return f"{_flag(name)} {excerpt(text, 60) or repr(text)}: give {wanted}."


def _wanted(field: FieldInfo) -> str:
    kind = _kind(field)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    bounds = [
        words.format(f"{bound:,}")
        for mark in field.metadata
        for name, words in _BOUNDS.items()
        if (bound := getattr(mark, name, None)) is not None
    ]
    return " ".join([_NUMBERS.get(kind, "true or false" if kind is bool else "a text"), " and ".join(bounds)]).strip()


def _system_text(text: str) -> str:
    """`text`, or the contents of FILE when it is `@FILE`; report.json holds texts and names no files."""
    if not text.startswith("@"):
        return text
    path = Path(text[1:]).expanduser()
    if not os.path.isfile(path):
        name = excerpt(str(path))
        raise UsageError(f"--system @{name}: {name} does not exist. Name a text file, or give the text itself.")
    return read_text(path, str(path), probe(path, str(path)))


def _system_prompt(options: Options) -> str:
    """The cleaned text of --system; {character} stays, for a repetition with another name."""
    text = options.system or ""
    if "{character}" in text and not options.characters:
        raise UsageError("--system holds {character}: add --character NAME to fill it in.")
    try:
        text = clean_text(text, "--system", Counter())
        clean_text(text.replace("{character}", "".join(options.characters[:1])), "--system", Counter())
    except RecordFault as fault:
        raise UsageError(f"--system: {fault.reason}. {fault.fix}.") from None
    if not text:
        raise UsageError("--system is empty. Give the text, or leave the flag out.")
    return text
