"""The folders that a run leaves behind: how they are told apart, read by the other scripts, and written."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from persona.config import DEFAULT_CONFIG, Config, load_config
from persona.errors import UsageError
from persona.files import ADAPTER_WEIGHTS, appearing, read_json, write_json
from persona.model.folders import NOTICE, fingerprint, read_config
from persona.model.sources import resolve_model

PERSONA = "persona.json"
# The files of a tokenizer in a Hugging Face folder; these travel byte for byte, because a tokenizer that is loaded
# and saved again loses the hash by which llama.cpp's converter knows it.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)


@dataclass(frozen=True)
class Persona:
    """Everything that training, chat, evaluation and merge must agree in."""

    base_name: str
    base_fingerprint: str
    """`persona.model.folders.fingerprint` of the base model's weights."""
    system_prompt: str | None
    date: str
    """The day that templates write as today's, ISO 8601."""


def read_persona(folder: Path) -> Persona | None:
    """The persona in `folder`, None if another tool made the folder; raises `UsageError` for one of another form."""
    path = folder / PERSONA
    if not path.is_file():
        return None
    values = read_json(path)
    advice = "Copy the folder again completely, or use the version of this toolkit that wrote it."
    if odd := sorted(values.keys() ^ {field.name for field in fields(Persona)}):
        raise UsageError(f"{path}: missing or unknown: {', '.join(odd)}. {advice}")
    try:
        date.fromisoformat(values["date"])
    except (TypeError, ValueError):
        raise UsageError(f"{path}: date: found {json.dumps(values['date'])}; expected 2024-05-01. {advice}") from None
    return Persona(**values)


def check_base(adapter: Path, base: Path) -> Persona | None:
    """The persona of `adapter`; raises `UsageError` if it was trained on other weights than those in `base`."""
    persona = read_persona(adapter)
    if persona is not None and persona.base_fingerprint != fingerprint(base):
        raise UsageError(
            f"{adapter} was trained on {persona.base_name}, but {base} holds other weights. Set model.name_or_path "
            "to the model it was trained on."
        )
    return persona


def public_name(name: str) -> str:
    """A model's name without the path on this machine: hub ids and plain names stay, a folder becomes its last part."""
    path = Path(name).expanduser()
    return path.resolve().name if os.path.exists(path) or path.is_absolute() or "\\" in name else name


def kind_of(folder: Path) -> str:
    """The kind of a path: `adapter`, `run`, `model`, `checkpoint`, `other` or `missing`."""
    if not os.path.isdir(folder):  # Path.is_dir() raises for a name longer than a file's may be
        return "missing"
    if (folder / "adapter_config.json").is_file():
        return "checkpoint" if (folder / "optimizer.safetensors").is_file() else "adapter"
    if config := read_config(folder):
        return "run" if "training" in config and "model_type" not in config else "model"
    return "run" if any(folder.glob("checkpoint-*")) else "other"


def adapter_folder(path: Path) -> Path:
    """The folder of an adapter: `path` itself, or the one in a finished run; raises `UsageError` for other folders."""
    kind = kind_of(path)
    if kind in ("adapter", "checkpoint"):
        if (path / ADAPTER_WEIGHTS).is_file():
            return path
        advice = "Copy it again completely; weights in .bin files can run code and are not loaded."
        raise UsageError(f"{path} is an adapter without {ADAPTER_WEIGHTS}. {advice}")
    if kind == "run":
        if kind_of(path / "adapter") == "adapter":
            return adapter_folder(path / "adapter")
        raise UsageError(f"{path} is a run that has not finished: run finetune.py again to go on.")
    reasons = {
        "model": "is a whole model, not an adapter",
        "missing": "does not exist",
        "other": "is neither an adapter nor the folder of a run",
    }
    advice = "Train one with finetune.py, or name the folder of a run (outputs/NAME) or an adapter."
    raise UsageError(f"{path} {reasons[kind]}. {advice}")


def run_settings(target: str | None, file: Path | None, overrides: list[str]) -> Config:
    """The settings that `target` was trained with, or those in `file` or the default, changed by `overrides`.

    Generation and export do not change what was learned: these two sections come from `file` if there is one.
    """
    folder = Path(target).expanduser().resolve() if target is not None else None
    run = folder.parent if folder is not None and kind_of(folder) != "run" else folder
    if run is None or kind_of(run) != "run" or not (run / "config.json").is_file():
        return load_config(file or DEFAULT_CONFIG, overrides)
    saved = load_config(run / "config.json", overrides)
    if file is None:
        return saved
    chosen = load_config(file, overrides)
    return saved.model_copy(update={"generation": chosen.generation, "export": chosen.export})


def locate(config: Config, target: str | None, base_only: bool) -> tuple[Path, Path | None]:
    """The folders of the base (or merged) model and of the adapter that `target` names, or else the configured run.

    With `base_only` the adapter is left out.
    """
    path = Path(target if target is not None else config.training.output_dir).expanduser()
    if target is not None and kind_of(path) in ("missing", "model", "other"):
        return resolve_model(target), None
    if base_only:
        return resolve_model(config.model.name_or_path), None
    adapter = adapter_folder(path)  # a mistake in its name comes before a download
    return resolve_model(config.model.name_or_path), adapter


def copy_tokenizer(base: Path, target: Path, chat_template: str) -> None:
    """Copy the base's tokenizer files and notice byte for byte to `target`, and write the trained chat template.

    A template of the base in tokenizer_config.json becomes the trained one: some programs take that, llama.cpp's
    converter first of all.
    """
    for name in (*TOKENIZER_FILES, NOTICE):
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    settings = target / "tokenizer_config.json"
    values = json.loads(settings.read_text(encoding="utf-8-sig")) if settings.is_file() else {}
    if values.get("chat_template", chat_template) != chat_template:
        write_json(settings, values | {"chat_template": chat_template})
    template = target / "chat_template.jinja"
    template.write_text(chat_template, encoding="utf-8", newline="\n")


def write_adapter(run: Path, source: Path, base: Path, chat_template: str, persona: Persona, model_card: str) -> Path:
    """Write `run/adapter` from the checkpoint `source`, weights byte for byte; it appears complete or not at all."""
    with appearing(run / "adapter") as folder:
        for name in (ADAPTER_WEIGHTS, "adapter_config.json"):
            shutil.copyfile(source / name, folder / name)
        copy_tokenizer(base, folder, chat_template)
        write_json(folder / PERSONA, asdict(persona))
        (folder / "README.md").write_text(model_card, encoding="utf-8", newline="\n")
    return run / "adapter"


def model_card(persona: Persona, title: str, facts: dict[str, Any], base: Path, merged: bool = False) -> str:
    """A model card in the hub's form: where the model comes from and what it was measured at, no line of the data.

    The notice in `base`, the base model's folder, is part of it.
    """
    kind = "model" if merged else "adapter"
    licence = f"The base model's licence applies to this {kind} too; read it before you publish."
    if (base / NOTICE).is_file():
        licence += f"\n\n{(base / NOTICE).read_text(encoding='utf-8').strip()}"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    front = ["---", f"base_model: {json.dumps(persona.base_name, ensure_ascii=False)}"]
    front += [f"library_name: {'transformers' if merged else 'peft'}", "tags:", *([] if merged else ["- lora"])]
    front += ["- persona", "---"]
    sentence = (
        f"A language model that speaks as a character or writes as an author: `{persona.base_name}` with a LoRA "
        "adapter merged into its weights."
        if merged
        else "A LoRA adapter that speaks as a character or writes as an author, trained on top of "
        f"`{persona.base_name}` with the persona toolkit."
    )
    return (
        "\n".join(front) + f"\n\n# {title}\n\n{sentence}\n\n| | |\n|---|---|\n{rows}\n\n"
        "Use it with the system prompt and the chat template that lie beside it: it was trained in that very context."
        f"\n\n{licence}\n\nWhat it writes is generated by a machine. Say so where you publish it, do not pass it "
        "off as words of a living person, and make sure you may use the texts it was trained on.\n"
    )


def merged_name(adapter: Path) -> str:
    """The name of the merged model: that of the adapter's run, followed by the checkpoint's if it is one."""
    folder = adapter.resolve()
    if kind_of(folder) == "checkpoint":
        return f"{folder.parent.name}-{folder.name}"
    return folder.parent.name if folder.name == "adapter" and folder.parent.name else folder.name
