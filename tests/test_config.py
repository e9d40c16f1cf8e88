"""The settings file: every mistake at once and what to write instead."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from persona.config import (
    FOREIGN_NAMES,
    all_settings,
    dump_config,
    load_config,
    schema_text,
    settings_table,
    write_generated,
)
from persona.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
LEAST = {
    "model": {"name_or_path": "m"},
    "data": {"train_file": "train.jsonl"},
    "training": {"output_dir": "outputs/x"},
}


def write(folder, values):
    path = folder / "settings.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def changed(name, value):
    """LEAST with the setting `name` set to `value`."""
    values = json.loads(json.dumps(LEAST))
    section, _, key = name.rpartition(".")
    (values.setdefault(section, {}) if section else values)[key] = value
    return values


def complaint(folder, values, *overrides):
    with pytest.raises(UsageError) as caught:
        load_config(write(folder, values), list(overrides))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_defaults_fill_what_is_left_out(tmp_path):
    config = load_config(write(tmp_path, LEAST), [])
    assert config.lora.r == 16
    assert config.training.learning_rate == 2e-4
    assert config.seed == 0


def test_a_character_that_no_path_can_hold_is_refused(tmp_path):
    assert "\\u0000" in complaint(tmp_path, changed("training.output_dir", "a\0b"))


def test_every_mistake_is_reported_at_once(tmp_path):
    values = {
        "model": {},
        "lora": {"r": 0, "lora_alpha": "32"},
        "data": {"train_file": "", "max_lenght": 100},
        "training": {"output_dir": "x", "learning_rat": 1, "lr_scheduler_type": "cosin"},
        "speed": 3,
    }
    text = complaint(tmp_path, values, "--no-equals", "seed=-1")
    assert text.startswith(f"10 mistakes in the settings ({tmp_path / 'settings.json'} with --set):")
    lines = text.splitlines()[1:]
    assert len(lines) == 10
    for wanted in (
        "--set --no-equals: expected section.key=value",
        "model.name_or_path is missing, and it has no default",
        "lora.r: found 0; expected a value greater than or equal to 1",
        'lora.lora_alpha: found "32"; expected a number (without quotation marks)',
        'data.train_file: found ""; expected some text',
        "data.max_lenght is not a setting; did you mean data.max_length?",
        "training.learning_rat is not a setting; did you mean training.learning_rate?",
        "training.lr_scheduler_type: found \"cosin\"; expected a value 'cosine', 'linear' or 'constant'",
        "seed: found -1; expected a value greater than or equal to 0",
        "speed is not a setting",
    ):
        assert sum(line.startswith(f"  - {wanted}") for line in lines) == 1, wanted


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("training.learningrate", "training.learning_rate"),
        ("lora.dropuot", "lora.lora_dropout"),
        ("learning_rate", "training.learning_rate"),
        ("training.max_length", "data.max_length"),
        ("trainig", "training"),
    ],
)
def test_did_you_mean(tmp_path, name, suggestion):
    text = complaint(tmp_path, changed(name, 1))
    assert f"{name} is not a setting" in text
    assert suggestion in text


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_names_of_other_tools_say_what_replaces_them(tmp_path, name):
    text = complaint(tmp_path, changed(f"training.{name}", 1))
    assert text.startswith("1 mistake ")
    assert f"training.{name} is not a setting here; use {FOREIGN_NAMES[name]}" in text


def test_replacements_name_real_settings():
    elsewhere = {"val_size", "report_to"}  # what replaces them is not a setting
    assert elsewhere < set(FOREIGN_NAMES)
    for name, advice in FOREIGN_NAMES.items():
        assert (advice.split()[0].rstrip(":,;") in all_settings()) == (name not in elsewhere), name
        assert name not in {setting.rpartition(".")[2] for setting in all_settings()}


@pytest.mark.parametrize("key", ["file", "weight"])
def test_what_a_character_knows_was_called_settings_before_and_is_called_lore_now(tmp_path, key):
    text = complaint(tmp_path, changed(f"data.settings_{key}", 2))
    assert text.splitlines()[1:] == [f"  - data.settings_{key} is not a setting here; use data.lore_{key}"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lora.r", 16.0, "a whole number"),
        ("lora.r", "16", "a whole number (without quotation marks)"),
        ("lora.r", True, "a whole number"),
        ("lora.r", 2000, "less than or equal to 1024"),
        ("training.learning_rate", "1e-4", "a number (without quotation marks)"),
        ("training.learning_rate", None, "a number"),
        ("training.gradient_checkpointing", "true", "true or false (without quotation marks)"),
        ("training.gradient_checkpointing", 1, "true or false"),
        ("quantization.load_in_4bit", 0, "true or false"),
        ("data.train_file", 3, "text in double quotes"),
        ("data.train_file", ["a.jsonl"], "text in double quotes"),
        ("lora.target_modules", [], "at least one name"),
        ("lora.target_modules", "q_proj", "a value 'all-linear' or a list"),
        ("lora", 3, "a section in braces"),
        ("lora.lora_dropout", 1, "less than 1"),
        ("training.precision", "bf32", "'auto', 'bf16', 'fp16' or 'fp32'"),
    ],
)
def test_values_are_never_coerced(tmp_path, name, value, expected):
    text = complaint(tmp_path, changed(name, value))
    assert f"{name}: found {json.dumps(value)}; expected " in text
    assert expected in text.partition("expected ")[2]


def test_a_whole_number_is_a_number(tmp_path):
    assert load_config(write(tmp_path, changed("lora.lora_alpha", 32)), []).lora.lora_alpha == 32.0


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("name", ["training.learning_rate", "lora.lora_alpha", "training.max_grad_norm"])
def test_numbers_that_are_none_are_refused(tmp_path, name, number):
    text = complaint(tmp_path, json.dumps(changed(name, 0.123)).replace("0.123", number))
    assert f"{name}: found " in text
    assert name in complaint(tmp_path, LEAST, f"{name}={number}")


@pytest.mark.parametrize("name", ["model.token", "hf_token", "model.api_key", "training.wandb_apikey", "data.Password"])
def test_secrets_are_refused_and_not_repeated(tmp_path, name):
    text = complaint(tmp_path, changed(name, "hf_abcdefgh12345678"))
    assert f"{name}: keys and tokens do not belong into this file" in text
    assert "hf_abcdefgh" not in text


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"seed": 1,}', ":1:"),
        ('{\n  // a comment\n  "seed": 1\n}', ":2:3: not valid JSON"),
        ('{\n  "seed": 1, # why\n}', ":2:14: not valid JSON"),
        ("{'seed': 1}", ":1:2: not valid JSON"),
        ('{\n  "seed": 1\n  "lora": {}\n}', ":3:3: not valid JSON"),
        ("", ":1:1: not valid JSON"),
        ("[1, 2]", ": expected an object"),
        ("null", ": expected an object"),
    ],
)
def test_what_is_not_json_is_shown_with_its_place(tmp_path, text, place):
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load_config(path, [])
    assert f"{path}{place}" in str(caught.value)
    if "not valid JSON" in str(caught.value):
        assert "JSON has no comments, no comma after the last item, and only double quotes." in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key"), [('{"seed": 1, "seed": 2}', "seed"), ('{"lora": {"r": 1, "lora_alpha": 2, "r": 3}}', "r")]
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, key):
    with pytest.raises(UsageError, match=f'the key "{key}" is there 2 times in one object'):
        load_config(write(tmp_path, text), [])


def test_a_number_too_long_to_be_read_is_refused(tmp_path):
    path = write(tmp_path, json.dumps(LEAST)[:-1] + f', "seed": {"9" * 5000}}}')
    with pytest.raises(UsageError, match=r"settings.json: a number has 5000 digits\."):
        load_config(path, [])


def test_schema_and_table_are_written_by_the_module(tmp_path):
    (tmp_path / "README.md").write_text("# 设置\n<!-- settings -->\nold\n<!-- /settings -->\nend\n", encoding="utf-8")
    write_generated(tmp_path)
    assert (tmp_path / "schema.json").read_text(encoding="utf-8") == schema_text()
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page == f"# 设置\n<!-- settings -->\n{settings_table()}<!-- /settings -->\nend\n"


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"no such file. Start from config/default.json"):
        load_config(tmp_path / "none.json", [])
    with pytest.raises(UsageError, match="is a folder; name the JSON file in it"):
        load_config(tmp_path, [])
    gbk = tmp_path / "gbk.json"
    gbk.write_bytes('{"model": "莫言秋"}'.encode("gbk"))
    with pytest.raises(UsageError, match="cannot be read as UTF-8"):
        load_config(gbk, [])


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "windows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(LEAST).replace(",", ",\r\n").encode())
    assert load_config(path, []).model.name_or_path == "m"


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("training.learning_rate=1e-3", "training.learning_rate", 1e-3),
        ("lora.r=8", "lora.r", 8),
        ("quantization.load_in_4bit=false", "quantization.load_in_4bit", False),
        ("data.validation_file=null", "data.validation_file", None),
        ('lora.target_modules=["q_proj","v_proj"]', "lora.target_modules", ["q_proj", "v_proj"]),
        ("data.train_file=a=b.jsonl", "data.train_file", "a=b.jsonl"),
        ("data.train_file=C:\\数据\\train.jsonl", "data.train_file", "C:\\数据\\train.jsonl"),
        ('data.train_file="12"', "data.train_file", "12"),
        ("data.system_prompt=", "data.system_prompt", ""),
        ("data.system_prompt=null", "data.system_prompt", None),
        ("data.system_prompt=[1]", "data.system_prompt", "[1]"),
        ("training.output_dir=2024", "training.output_dir", "2024"),
        ("model.name_or_path=true", "model.name_or_path", "true"),
        (f"data.train_file={'9' * 5000}", "data.train_file", "9" * 5000),
        ("data.system_prompt=You are Tamsin.", "data.system_prompt", "You are Tamsin."),
        ("seed=7", "seed", 7),
        (" seed =7", "seed", 7),
    ],
)
def test_set_takes_json_or_else_text(tmp_path, override, name, value):
    config = load_config(write(tmp_path, LEAST), [override]).model_dump()
    for part in name.split("."):
        config = config[part]
    assert config == value
    assert type(config) is type(value)


def test_the_last_set_wins(tmp_path):
    assert load_config(write(tmp_path, LEAST), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.learning_rat=1", "did you mean training.learning_rate?"),
        ("lora.r=eight", 'lora.r: found "eight"; expected a whole number'),
        ("lora.r", "--set lora.r: expected section.key=value"),
        ("=3", "--set =3: expected section.key=value"),
        ("lora..r=3", "--set lora..r=3: expected section.key=value"),
        ("seed.x.y=3", "seed"),
        ("lora_rank=8", "lora_rank is not a setting here; use lora.r"),
        ("training.output_dir=null", "training.output_dir: found null; expected text"),
        (f"seed={'9' * 5000}", "--set seed: "),
        ("lora.target_modules=" + "[" * 100_000, "--set lora.target_modules: "),
    ],
)
def test_set_is_checked_like_the_file(tmp_path, override, said):
    text = complaint(tmp_path, {**LEAST, "seed": 1}, override)
    assert said in text
    assert len(text) < 1000


def test_a_dumped_config_loads_back_equal(tmp_path):
    values = changed("data.system_prompt", '你是莫言秋。\n"引号" \\ \u2028 🌊')
    values["lora"] = {"target_modules": ["q_proj"], "lora_alpha": 1e-7, "lora_dropout": 0.1}
    values["seed"] = 2**32 - 1
    config = load_config(write(tmp_path, values), [])
    text = dump_config(config)
    again = load_config(write(tmp_path, text), [])
    assert again == config
    assert dump_config(again) == text
    assert "莫言秋" in text
    dumped = json.loads(text)
    for name in all_settings():
        section, _, key = name.rpartition(".")
        assert key in (dumped[section] if section else dumped)


def test_nothing_changes_a_loaded_config(tmp_path):
    config = load_config(write(tmp_path, LEAST), [])
    with pytest.raises(ValueError, match="frozen"):
        config.lora.r = 3


# --- the files of the repository -------------------------------------------------------------------------------------


def test_the_schema_file_is_fresh():
    found = (ROOT / "config" / "schema.json").read_text(encoding="utf-8")
    assert found == schema_text(), "run python -m persona.config"


def test_the_schema_describes_every_setting():
    schema = json.loads(schema_text())
    for name in all_settings():
        section, _, key = name.rpartition(".")
        owner = schema
        if section:
            reference = schema["properties"][section]
            reference = reference.get("$ref") or reference["allOf"][0]["$ref"]
            owner = schema["$defs"][reference.rpartition("/")[2]]
            assert owner["additionalProperties"] is False
        assert owner["properties"][key]["description"].endswith("."), name
    assert schema["additionalProperties"] is False


def test_the_table_has_every_setting():
    table = settings_table()
    assert [line.split("`")[1] for line in table.splitlines()[2:]] == list(all_settings())


def test_default_json_loads():
    path = ROOT / "config" / "default.json"
    load_config(path, [])
    schema = json.loads(path.read_text(encoding="utf-8")).get("$schema")
    assert (path.parent / schema).resolve() == path.parent / "schema.json"


def test_every_preset_loads():
    presets = sorted((ROOT / "config" / "presets").glob("*.json"))
    assert len(presets) >= 10
    for path in presets:
        load_config(path, [])
        schema = json.loads(path.read_text(encoding="utf-8")).get("$schema")
        assert (path.parent / schema).resolve() == ROOT / "config" / "schema.json", path


def test_a_wrong_setting_is_answered_within_a_second():
    command = [sys.executable, "finetune.py", "--set", "training.learning_rat=1", "--set", "lora.r=0"]
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
        times.append(time.perf_counter() - begun)
        assert result.returncode == 2
        assert "2 mistakes" in result.stderr
        assert "training.learning_rat is not a setting; did you mean training.learning_rate?" in result.stderr
        assert "lora.r: found 0" in result.stderr
        assert "Traceback" not in result.stderr
        assert result.stdout == ""
        if times[-1] < 1:
            return
    pytest.fail(f"it took {min(times):.1f} s: something heavy is imported before the settings are checked")
