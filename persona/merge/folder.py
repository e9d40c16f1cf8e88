"""The merged model's folder: where it may be written, and the files beside its weights.

No file holds a line of the data or a path of this machine: the folder is made to be given away.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig

from persona.config import Generation
from persona.errors import EnvironmentFault, UsageError
from persona.files import ADAPTER_WEIGHTS, JsonObject, check_folder, file_sha256, read_json, write_json, write_text
from persona.merge.weights import Output
from persona.model.adapters import PERSONA, TOKENIZER_FILES, copy_tokenizer, merged_name, model_card, read_persona
from persona.model.folders import NOTICE
from persona.model.loading import CHAT_TEMPLATE_OF_TOWERS, trained_format

_OWN_FILES = {"config.json", "generation_config.json", "chat_template.jinja", "README.md", "run.json", PERSONA}
# The settings by which a model that reads pictures or sound prepares them
_TOWER_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_OWN_FILES |= {*TOKENIZER_FILES, NOTICE, *_TOWER_FILES, CHAT_TEMPLATE_OF_TOWERS}
_OWN_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_REST_BYTES = 64 * 2**20  # tokenizer and settings: the largest tokenizer.json known has 34 MB
# The sampling that a base's own generation_config.json may hold; ours replaces all of it
_SAMPLING = {
    *("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "num_beams", "penalty_alpha", "max_length", "max_new_tokens"),
    "_from_model_config",  # with it transformers would take its settings from config.json again
}


def check_output(output: Path, base: Path, adapter: Path) -> None:
    """Raise `UsageError` if `output` may not be replaced: an input, the current folder, not a merged model of ours."""
    folder, another = output.resolve(), "choose another folder with --output."
    for source in (base, adapter):
        if folder == source.resolve() or source.resolve() in folder.parents:
            raise UsageError(f"The output {output} is inside the input {source}; {another}")
        if folder in source.resolve().parents:
            raise UsageError(f"The output {output} would replace the folder that holds the input {source}; {another}")
    check_folder(folder, "--output")
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(f"The output {output} is the current folder or holds it; {another}")
    present = sorted(path.name for path in folder.iterdir()) if os.path.isdir(folder) else []
    strange = [name for name in present if name not in _OWN_FILES and not _OWN_WEIGHTS.fullmatch(name)]
    if strange:
        names = ", ".join(strange[:5]) + (", ..." if len(strange) > 5 else "")
        raise UsageError(
            f"{output} would be replaced, but holds files that no merge wrote: {names}. Move it, or {another}"
        )
    if present and PERSONA not in present:
        raise UsageError(f"{output} exists and is not a merged model of ours (no {PERSONA}); remove it, or {another}")


def check_space(plans: Sequence[Sequence[Output]], folder: Path) -> None:
    """Raise `EnvironmentFault` if the disk has no room for every planned model at once, beside an earlier `folder`."""
    there = next(path for path in folder.parents if os.path.isdir(path))
    needed = sum(sum(tensor.size for tensor in plan) + _REST_BYTES for plan in plans)
    free = shutil.disk_usage(there).free
    if needed > free:
        kept = " The earlier model is kept until the new one is whole." if os.path.isdir(folder) else ""
        raise EnvironmentFault(
            f"The merged model needs {needed / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB free.{kept} Nothing "
            "was written; make space, or choose a folder on another disk with --output."
        )


def write_rest(
    folder: Path, base: Path, adapter: Path, dtype: torch.dtype, generation: Generation, untied: bool
) -> None:
    """Write everything but the weights: configuration, tokenizer, chat template, sampling, persona, model card, run.

    The run that `adapter` belongs to tells what it was trained on and measured at. With `untied` input and output
    embeddings are two tensors.
    """
    dtype_name, persona = str(dtype).removeprefix("torch."), read_persona(adapter)
    config = read_json(base / "config.json")
    config["dtype"] = dtype_name
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            section |= {"tie_word_embeddings": False} if untied else {}
            section |= {"dtype": dtype_name} if section.pop("torch_dtype", None) or "dtype" in section else {}
    write_json(folder / "config.json", config)
    for name in _TOWER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    fmt = trained_format(base, adapter)
    copy_tokenizer(base, folder, fmt.tokenizer.chat_template)
    path = base / "generation_config.json"
    if path.is_file():
        own = read_json(path)
    else:
        own = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base)).to_diff_dict()
    end = own.get("eos_token_id")
    ends = {fmt.end_id, fmt.tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None}
    # not saved by transformers, which refuses to save some that it loads: that of Llama 2, for one
    kept = {key: value for key, value in (own | {"eos_token_id": sorted(ends)}).items() if key not in _SAMPLING}
    write_json(folder / path.name, kept | sampling(generation))
    run = adapter.resolve().parent / "run.json"
    trained = read_json(run) if run.is_file() else {}
    record = {
        "merged": {"adapter_sha256": file_sha256(adapter / ADAPTER_WEIGHTS), "dtype": dtype_name},
        "persona": asdict(persona) if persona is not None else None,
        "trained": without_paths(trained),
    }
    write_json(folder / "run.json", record)
    if persona is not None:
        write_json(folder / PERSONA, asdict(persona))
        facts = trained.get("counts", {}) | trained.get("summary", {}) | {"weights": dtype_name}
        write_text(folder / "README.md", model_card(persona, merged_name(adapter), facts, base, merged=True))


def sampling(generation: Generation) -> JsonObject:
    """The sampling of `test_model.py` in the names of transformers, which refuses an unused temperature."""
    values: JsonObject = {
        "do_sample": generation.temperature > 0,
        "repetition_penalty": generation.repetition_penalty,
        "max_new_tokens": generation.max_new_tokens,
    }
    if generation.temperature > 0:
        values |= {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
    return values


def without_paths(record: JsonObject) -> JsonObject:
    """The record of a run with each path of a file or folder shortened to its last part."""
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
    """The last part of a path of any system; a hub id is not a path and stays whole."""
    local = path.startswith((".", "/", "~")) or "\\" in path or ":" in path or os.path.exists(path)
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2] if local or path.count("/") != 1 else path
