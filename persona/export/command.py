"""The files for other programs that the command line asks for: checked before the work, then written."""

import os
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from persona.config import Config
from persona.console import safe, table
from persona.errors import UsageError
from persona.export.gguf import check_output, convert_adapter, convert_model, plain_lora
from persona.export.llama_cpp import ADAPTER_SCRIPT, MODEL_SCRIPT, check_checkout, check_model
from persona.export.ollama import modelfile
from persona.files import JsonObject, check_file, write_json, write_text
from persona.model.adapters import read_persona
from persona.model.dataset import read_system_prompt
from persona.model.render import ChatFormat, Message
from persona.records import MACRO, read_records

_OURS = "Written by merge_lora_to_fp16.py"


@dataclass(frozen=True)
class Tuned:
    """The tuned model that the files are written from."""

    name: str
    base: Path
    adapter: Path
    merged: Path
    """Folder of the merged model, which is there when files are written."""
    fmt: ChatFormat
    config: Config

    @property
    def system(self) -> str | None:
        """The system prompt that was trained."""
        persona = read_persona(self.adapter)
        return persona.system_prompt if persona is not None else None


def check_options(options: Namespace, tuned: Tuned) -> None:
    """Raise `UsageError` for what would fail when the files are written, after the merge."""
    _refuse_unused(options)
    named = {"--gguf": options.gguf, "--gguf-adapter": options.gguf_adapter}
    outputs = {option: path for option, path in named.items() if path is not None}
    if outputs and options.llama_cpp is None:
        raise UsageError("--gguf and --gguf-adapter need --llama-cpp DIR, the folder of llama.cpp's source.")
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        raise UsageError(f"--gguf and --gguf-adapter name the same file, {options.gguf}.")
    for option, path in outputs.items():
        check_output(path, option, [tuned.base, tuned.adapter, tuned.merged])
        _check_beside(path)
    if options.gguf:
        check_checkout(options.llama_cpp, MODEL_SCRIPT)
        check_model(tuned.base, tuned.fmt.tokenizer, options.llama_cpp.expanduser())
    if options.gguf_adapter:
        check_checkout(options.llama_cpp, ADAPTER_SCRIPT)
        plain_lora(tuned.adapter, tuned.base)
    if options.character_card is not None:
        if options.character_card.suffix != ".json":
            raise UsageError(f"{options.character_card}: name the character card NAME.json.")
        check_file(options.character_card, "--character-card")
    read_system_prompt(options.greeting, "--greeting")
    train_file = tuned.config.data.train_file
    if options.examples and not os.path.isfile(train_file):
        raise UsageError(
            f"--examples: the training data of this run, {train_file}, is not there. Run this in the folder in which "
            "you trained, or name the file with --set data.train_file=FILE."
        )


def _check_beside(gguf: Path) -> None:
    """Raise `UsageError` if a file that is written beside `gguf` is there and of somebody else."""
    for path in (gguf.with_suffix(".Modelfile"), gguf.with_suffix(".jinja")):
        text = path.read_text(encoding="utf-8", errors="replace") if os.path.exists(path) else _OURS
        if _OURS not in text.partition("\n")[0]:
            raise UsageError(f"{path} exists and was not written by this script; move it, or name another GGUF file.")


def _refuse_unused(options: Namespace) -> None:
    """Raise `UsageError` for an option that would do nothing, because the one that it belongs to is missing."""
    card, gguf = options.character_card, options.gguf
    merges = options.output or gguf or not (options.gguf_adapter or card)
    needs = {
        "--character": (options.character, card, "--character-card"),
        "--greeting": (options.greeting, card, "--character-card"),
        "--examples": (options.examples, card, "--character-card"),
        "--outtype": (options.outtype, gguf, "--gguf"),
        "--no-verify": (options.no_verify, merges, "--output or --gguf"),
        "--compare-bases": (options.compare_bases, merges, "--output or --gguf"),
        "--llama-cpp": (options.llama_cpp, gguf or options.gguf_adapter, "--gguf or --gguf-adapter"),
    }
    for option, (value, partner, name) in needs.items():
        if value and not partner:
            raise UsageError(f"{option} does nothing without {name}. Give that too, or leave {option} out.")


def write_files(options: Namespace, tuned: Tuned) -> Iterator[str]:
    """Write the files that `options` ask for, after `check_options`; returns a paragraph to print for each."""
    if options.gguf:
        yield _write_model(options.gguf, options.llama_cpp.expanduser(), options.outtype or "f16", tuned)
    if options.gguf_adapter:
        yield _write_adapter(options.gguf_adapter, options.llama_cpp.expanduser(), tuned)
    if options.character_card:
        yield _write_card(options, tuned)


def _write_model(output: Path, llama_cpp: Path, outtype: str, tuned: Tuned) -> str:
    report, notes = convert_model(tuned.merged, output, llama_cpp, outtype, tuned.fmt)
    compared = f"all {report.tensors} tensors"
    if report.unknown:
        compared = f"{report.tensors - report.unknown} of {report.tensors} tensors"
        notes.append(
            f"{report.unknown} tensors could not be compared, since it is not known here how llama.cpp arranges "
            f"them in a {report.architecture} model; talk to it before you rely on it"
        )
    if report.outside:
        notes.append(
            f"{report.outside} tensors that read pictures or sound are not in it; llama.cpp's {MODEL_SCRIPT} with "
            "--mmproj writes them into a file of their own"
        )
    summary = (
        f"Written {output} ({report.architecture}, {report.type_name}): {compared}, vocabulary, end "
        f"tokens and chat template are those of {tuned.merged}; largest rounding {report.largest_error:.1e}."
    )
    notes += _write_modelfile(output, [f"FROM ./{output.name}"], report.adds_bos, tuned)
    return _paragraph(summary, notes, output, f"-m {output.as_posix()}")


def _write_adapter(output: Path, llama_cpp: Path, tuned: Tuned) -> str:
    count = convert_adapter(tuned.adapter, tuned.base, output, llama_cpp)
    persona, tokenizer = read_persona(tuned.adapter), tuned.fmt.tokenizer
    base_name = persona.base_name if persona is not None else tuned.base.name
    base_file = output.with_name(base_name.rpartition("/")[2].removesuffix(".gguf") + ".gguf")
    summary = (
        f"Written {output}: the adapter without its base, all {count} matrices compared. It needs a GGUF file of the "
        f"base; write that one with\n  python {llama_cpp / MODEL_SCRIPT} {tuned.base} --outfile {base_file} "
        "--outtype f16"
    )
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    notes = _write_modelfile(output, [f"FROM ./{base_file.name}", f"ADAPTER ./{output.name}"], adds_bos, tuned)
    template = output.with_suffix(".jinja")  # the base's file has the base's own, which may think
    write_text(template, f"{{#- {_OURS} as the chat template of {output.name} #}}\n{tokenizer.chat_template}")
    options = f"-m {base_file.as_posix()} --lora {output.as_posix()} --chat-template-file {template.as_posix()}"
    return _paragraph(summary, notes, output, options)


def _write_modelfile(gguf: Path, start: list[str], adds_bos: bool, tuned: Tuned) -> list[str]:
    """Write the Modelfile beside `gguf`; returns notes for a person."""
    config, path = tuned.config, gguf.with_suffix(".Modelfile")
    text, notes = modelfile(start, tuned.fmt, adds_bos, tuned.system, config.generation, config.data.max_length)
    write_text(path, f"# {_OURS}; ollama create {gguf.stem.lower()} -f {path.name}\n{text}")
    return notes


def _paragraph(summary: str, notes: list[str], gguf: Path, options: str) -> str:
    commands = [
        ("Ollama", f"ollama create {gguf.stem.lower()} -f {gguf.with_suffix('.Modelfile').as_posix()}"),
        ("llama.cpp", f"llama-server {options} --jinja"),
    ]
    return "\n".join([summary, *(f"Note: {note}." for note in notes), table(commands)])


def _write_card(options: Namespace, tuned: Tuned) -> str:
    character, output, system = options.character or tuned.name, options.character_card, tuned.system
    greeting = read_system_prompt(options.greeting, "--greeting") or ""
    records = read_records(Path(tuned.config.data.train_file)) if options.examples else []
    dialogues = [record.turns for record in records if record.meta.get("type", "dialogue") == "dialogue"]
    examples = dialogues[: options.examples]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, character_card(character, system, greeting, examples, tuned.name))
    lines = [f"Written {output}: the character card of {safe(character)}."]
    if examples:
        lines.append(
            f"Note: it holds {len(examples)} conversations of the training data; everyone who has it can read them."
        )
    if system is None:
        lines.append("Note: this adapter has no system prompt, so the card has none.")
    if any("{{" in text or MACRO.search(text) for text in (system or "", greeting)):
        lines.append("Note: front ends will replace macros in it such as {{user}}; training did not.")
    return "\n".join(lines)


def character_card(
    name: str, system: str | None, greeting: str, examples: Sequence[Sequence[Message]], model: str
) -> JsonObject:
    """The character card, version 2, of the persona `name`, whose tuned model is called `model`.

    Form: https://github.com/malfoyslastname/character-card-spec-v2/blob/main/spec_v2.md; all its fields are required.
    The system prompt is in `system_prompt` only, which front ends send instead of their own: the model was trained with
    this text in this place, and a description would be sent beside it.
    """
    return {
        "spec": "chara_card_v2",
        "spec_version": "2.0",
        "data": {
            "name": name,
            "description": "",
            "personality": "",
            "scenario": "",
            "first_mes": greeting,
            "mes_example": "".join(map(_example, examples)),
            "creator_notes": (
                f"For the model {model}, which was tuned to speak as {name}. Use its own chat template, and let the "
                "card's system prompt replace the front end's (in SillyTavern: Prefer Char. Prompt)."
            ),
            "system_prompt": system or "",
            "post_history_instructions": "",
            "alternate_greetings": [],
            "tags": ["persona"],
            "creator": "",
            "character_version": "1",
            "extensions": {},
        },
    }


def _example(messages: Iterable[Message]) -> str:
    speaker = {"user": "{{user}}", "assistant": "{{char}}"}
    turns = [message for message in messages if message["role"] in speaker]
    return "<START>\n" + "".join(f"{speaker[turn['role']]}: {turn['content']}\n" for turn in turns)
