"""What a merged model's folder says of itself: how it speaks, where it comes from, and how it was made.

Nothing in these files is a line of the data or a path of this machine: the folder is made to be given away.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from persona.config import Generation
from persona.files import ADAPTER_WEIGHTS, file_sha256, read_json, write_json, write_text
from persona.model.adapters import PERSONA, Persona, copy_tokenizer, model_card

# What a base's own generation_config.json may say of the choice of words; ours takes the place of all of it
_SAMPLING = {
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "num_beams", "penalty_alpha", "max_length", "max_new_tokens"),
    "_from_model_config",  # with it transformers would take its settings from config.json again
}
LICENCE = "The base model's licence applies to this model too; read it before you publish."


def describe_merged(
    folder: Path, adapter: Path, title: str, persona: Persona | None, generation: Generation, dtype: str
) -> None:
    """Complete the merged model in `folder`: sampling in generation_config.json, README.md and run.json.

    `adapter` is what was merged; the run it lies in tells what it was trained on and measured at.
    """
    path = folder / "generation_config.json"
    kept = {key: value for key, value in read_json(path).items() if key not in _SAMPLING}
    write_json(path, kept | sampling(generation))
    run = adapter.resolve().parent / "run.json"
    trained = read_json(run) if run.is_file() else {}
    record = {
        "merged": {"adapter_sha256": file_sha256(adapter / ADAPTER_WEIGHTS), "dtype": dtype},
        "persona": asdict(persona) if persona is not None else None,
        "trained": without_paths(trained),
    }
    write_json(folder / "run.json", record)
    if persona is not None:
        facts = trained.get("counts", {}) | trained.get("summary", {}) | {"weights": dtype}
        write_text(folder / "README.md", model_card(persona, title, facts, LICENCE, merged=True))


def sampling(generation: Generation) -> dict[str, Any]:
    """The settings of `test_model.py` in the names of transformers, which refuses a temperature where none is used."""
    values: dict[str, Any] = {
        "do_sample": generation.temperature > 0,
        "repetition_penalty": generation.repetition_penalty,
        "max_new_tokens": generation.max_new_tokens,
    }
    if generation.temperature > 0:
        values |= {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
    return values


def without_paths(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a run with the last part of each file's and folder's path alone."""
    settings = json.loads(json.dumps(record.get("settings", {})))
    for section, keys in {
        "data": ("train_file", "validation_file", "lore_file", "system_prompt"),
        "model": ("name_or_path", "chat_template"),
    }.items():
        values = settings.get(section) or {}
        for key in keys:
            text = values.get(key)
            if isinstance(text, str) and (key != "system_prompt" or text.startswith("@")):
                values[key] = f"{'@' if text.startswith('@') else ''}{_last(text.removeprefix('@'))}"
    plain = {key: value for key, value in record.items() if key not in ("settings", "data_sha256", "system_prompt")}
    hashes = [{"file": _last(name), "sha256": digest} for name, digest in record.get("data_sha256", {}).items()]
    return plain | ({"settings": settings, "data_sha256": hashes} if record else {})


def _last(path: str) -> str:
    """The last part of a path of any system; a hub id is none and stays whole."""
    local = path.startswith((".", "/", "~")) or "\\" in path or ":" in path or Path(path).exists()
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2] if local or path.count("/") != 1 else path


def _write_rest(
    base: Path, adapter: Path, folder: Path, dtype: torch.dtype, persona: Persona | None, untied: bool
) -> None:
    """Configuration, tokenizer, chat template and generation configuration with every token that ends a reply."""
    from transformers import AutoConfig, GenerationConfig

    from persona.model.loading import trained_format

    config = read_json(base / "config.json")
    config.pop("torch_dtype", None)
    if untied:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    fmt = trained_format(base, adapter)
    copy_tokenizer(base, folder, fmt.tokenizer.chat_template)
    name = "generation_config.json"
    if (base / name).is_file():
        generation = read_json(base / name)
    else:
        generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base)).to_diff_dict()
    own = generation.get("eos_token_id")
    ends = [fmt.end_id, fmt.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    # not by transformers, which refuses to save what it loads: that of Llama 2, for one
    write_json(folder / name, generation | {"eos_token_id": sorted({i for i in ends if i is not None})})
    if persona is not None:
        write_json(folder / PERSONA, asdict(persona))
