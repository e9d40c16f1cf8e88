"""The files that other programs load, as asked for on the command line: checked before the work, then written."""

import os
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from persona.config import Config
from persona.console import safe, table
from persona.errors import UsageError
from persona.export.gguf import check_output, convert_adapter, convert_model, plain_lora
from persona.export.llama_cpp import ADAPTER_SCRIPT, MODEL_SCRIPT, OUTTYPES, check_checkout, check_model
from persona.export.ollama import modelfile
from persona.files import write_json, write_text
from persona.model.adapters import read_persona
from persona.model.dataset import read_system_prompt
from persona.model.render import ChatFormat, Message
from persona.records import read_records

# --- character card ---------------------------------------------------------------------------------------------------
# A character card, version 2: the persona for SillyTavern and other front ends of role play.
#
# Form: https://github.com/malfoyslastname/character-card-spec-v2/blob/main/spec_v2.md; all its fields are required.


def character_card(
    name: str, system: str | None, greeting: str, examples: Sequence[Sequence[Message]], model: str
) -> dict[str, Any]:
    """The card of the persona `name`, whose tuned model is called `model`.

    The system prompt stands in `system_prompt` alone, which front ends send in place of their own: the model was
    trained with this text in this place, and a description would be sent beside it.
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
    who = {"user": "{{user}}", "assistant": "{{char}}"}
    spoken = [f"{who[message['role']]}: {message['content']}\n" for message in messages if message["role"] in who]
    return "<START>\n" + "".join(spoken)


def macros_in(*texts: str) -> bool:
    """Whether a front end would replace something in one of `texts`: it reads {{...}}, <USER>, <BOT> as macros."""
    return any(mark in text for text in texts for mark in ("{{", "<USER>", "<BOT>", "<user>", "<bot>"))


_OURS = "# Written by merge_lora_to_fp16.py; "


@dataclass(frozen=True)
class Wanted:
    """The files asked for; None for those that are not."""

    gguf: Path | None = None
    outtype: str = OUTTYPES[0]
    gguf_adapter: Path | None = None
    llama_cpp: Path | None = None
    character_card: Path | None = None
    character: str | None = None
    greeting: str = ""
    examples: int = 0
    """Conversations of the training data to put into the card."""

    @classmethod
    def of(cls, options: Namespace) -> "Wanted":
        """What the command line asks for, in options of the same names."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)})


def check_wanted(wanted: Wanted, base: Path, adapter: Path, merged: Path, fmt: ChatFormat, train_file: str) -> None:
    """Raise `UsageError` for what would fail later, when the model is merged. `merged` is the folder to be made."""
    outputs = [path for path in (wanted.gguf, wanted.gguf_adapter) if path is not None]
    if outputs and wanted.llama_cpp is None:
        raise UsageError("--gguf and --gguf-adapter need --llama-cpp DIR, the folder of llama.cpp's source.")
    if wanted.gguf and wanted.gguf_adapter and wanted.gguf.resolve() == wanted.gguf_adapter.resolve():
        raise UsageError(f"--gguf and --gguf-adapter name the same file, {wanted.gguf}.")
    for path in outputs:
        check_output(path, [base, adapter, merged])
        _check_ours(path.with_suffix(".Modelfile"))
    if wanted.gguf and wanted.llama_cpp:
        check_checkout(wanted.llama_cpp, MODEL_SCRIPT)
        check_model(base, fmt.tokenizer, wanted.llama_cpp.expanduser())
    if wanted.gguf_adapter and wanted.llama_cpp:
        check_checkout(wanted.llama_cpp, ADAPTER_SCRIPT)
        plain_lora(adapter, base)
    if wanted.character_card is not None and wanted.character_card.suffix != ".json":
        raise UsageError(f"{wanted.character_card}: a character card is named NAME.json.")
    read_system_prompt(wanted.greeting, "--greeting")
    if wanted.examples and not Path(train_file).is_file():
        raise UsageError(
            f"--examples: the training data of this run, {train_file}, is not there. Run this in the folder in which "
            "you trained, or name the file with --set data.train_file=FILE."
        )


def _check_ours(path: Path) -> None:
    if os.path.exists(path) and not path.read_text(encoding="utf-8", errors="replace").startswith(_OURS):
        raise UsageError(f"{path} is there and was not written by this script; move it, or name another GGUF file.")


def write_files(
    wanted: Wanted, merged: Path, base: Path, adapter: Path, fmt: ChatFormat, config: Config, name: str
) -> Iterator[str]:
    """Write what was asked for, after `check_wanted`; says of each file what was done and what to type next."""
    if wanted.gguf and wanted.llama_cpp:
        yield _model(wanted.gguf, wanted.llama_cpp.expanduser(), wanted.outtype, merged, adapter, fmt, config)
    if wanted.gguf_adapter and wanted.llama_cpp:
        yield _adapter(wanted.gguf_adapter, wanted.llama_cpp.expanduser(), base, adapter, fmt, config)
    if wanted.character_card:
        yield _character_card(wanted, wanted.character_card, adapter, config, name)


def _model(
    output: Path, llama_cpp: Path, outtype: str, merged: Path, adapter: Path, fmt: ChatFormat, config: Config
) -> str:
    made = convert_model(merged, output, llama_cpp, outtype, fmt, output.stem)
    report, notes = made.report, list(made.changes)
    compared = f"all {report.tensors} tensors"
    if report.unknown:
        compared = f"{report.tensors - report.unknown} of {report.tensors} tensors"
        notes.append(
            f"{report.unknown} tensors could not be compared, since it is not known here how llama.cpp arranges "
            f"them in a {report.architecture} model; talk to it before you rely on it"
        )
    said = (
        f"Written {output} ({report.architecture}, {report.type_name}): {compared}, vocabulary, end "
        f"tokens and chat template are those of {merged}; largest rounding {report.largest_error:.1e}."
    )
    notes += _modelfile(output, [f"FROM ./{output.name}"], fmt, made.adds_bos, adapter, config)
    return _told(said, notes, output, f"-m {output.as_posix()}")


def _adapter(output: Path, llama_cpp: Path, base: Path, adapter: Path, fmt: ChatFormat, config: Config) -> str:
    tensors = convert_adapter(adapter, base, output, llama_cpp)
    persona, tokenizer = read_persona(adapter), fmt.tokenizer
    name = persona.base_name if persona is not None else base.name
    base_file = output.with_name(name.rpartition("/")[2].removesuffix(".gguf") + ".gguf")
    said = (
        f"Written {output}: the adapter alone, all {tensors} matrices compared. It belongs on a GGUF file of its base; "
        f"make that one with\n  python {llama_cpp / MODEL_SCRIPT} {base} --outfile {base_file} --outtype f16"
    )
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    start = [f"FROM ./{base_file.name}", f"ADAPTER ./{output.name}"]
    notes = _modelfile(output, start, fmt, adds_bos, adapter, config)
    return _told(said, notes, output, f"-m {base_file.as_posix()} --lora {output.as_posix()}")


def _modelfile(
    gguf: Path, start: list[str], fmt: ChatFormat, adds_bos: bool, adapter: Path, config: Config
) -> list[str]:
    """Write the Modelfile beside `gguf` and return what a person should know of it."""
    persona, path = read_persona(adapter), gguf.with_suffix(".Modelfile")
    system = persona.system_prompt if persona is not None else None
    made = modelfile(start, fmt, adds_bos, system, config.generation, config.data.max_length)
    write_text(path, f"{_OURS}ollama create {gguf.stem.lower()} -f {path.name}\n{made.text}")
    return made.notes


def _told(said: str, notes: list[str], gguf: Path, options: str) -> str:
    commands = [
        ("Ollama", f"ollama create {gguf.stem.lower()} -f {gguf.with_suffix('.Modelfile').as_posix()}"),
        ("llama.cpp", f"llama-server {options} --jinja"),
    ]
    return "\n".join([said, *(f"Note: {note}." for note in notes), table(commands)])


def _character_card(wanted: Wanted, output: Path, adapter: Path, config: Config, name: str) -> str:
    persona, character = read_persona(adapter), wanted.character or name
    system = persona.system_prompt if persona is not None else None
    greeting = read_system_prompt(wanted.greeting, "--greeting") or ""
    records = read_records(Path(config.data.train_file)) if wanted.examples else []
    dialogues = [record.turns for record in records if record.meta.get("type", "dialogue") == "dialogue"]
    examples = dialogues[: wanted.examples]
    write_json(output, character_card(character, system, greeting, examples, name))
    lines = [f"Written {output}: the character card of {safe(character)}."]
    if examples:
        lines.append(f"Note: it holds {len(examples)} conversations of the training data; who has it can read them.")
    if system is None:
        lines.append("Note: this adapter has no system prompt, so the card has none.")
    if macros_in(system or "", greeting):
        lines.append("Note: front ends will replace what looks like a macro in it, as {{user}}; training did not.")
    return "\n".join(lines)
