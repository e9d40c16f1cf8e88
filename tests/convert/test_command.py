"""The script as a person runs it: exit codes, what is printed, what is left on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from persona.convert.command import choose, command_of, parser
from persona.convert.options import Options

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "data" / "examples"


def run(*arguments):
    command = [sys.executable, str(ROOT / "convert_dataset.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=60)
    assert "Traceback" not in done.stderr
    return done


def test_help_is_quick_and_loads_nothing_heavy():
    def spent():
        now = os.times()  # of processes that ended, which other work on the machine does not lengthen
        return now.children_user + now.children_system

    times = []
    for _ in range(3):
        before = spent()
        done = run("--help")
        times.append(spent() - before)
    assert done.returncode == 0
    assert "--character" in done.stdout
    assert min(times) < 0.5


def test_a_conversion(tmp_path):
    done = run(
        EXAMPLES / "play.txt", "--character", "EDDA", "--output", tmp_path / "edda", "--system", "You are {character}."
    )
    assert done.returncode == 0, done.stderr
    assert "records: read 2 = written 2 + rejected 0 + duplicates 0" in done.stdout
    assert "speeches: 6 = learned 3 + context 3 + not used 0" in done.stdout
    assert "python finetune.py --set data.train_file=" in done.stdout
    assert sorted(path.name for path in (tmp_path / "edda").iterdir()) == [
        "rejected.jsonl",
        "report.html",
        "report.json",
        "train.jsonl",
        "val.jsonl",
    ]
    report = json.loads((tmp_path / "edda" / "report.json").read_text("utf-8"))
    assert report["system_prompt"] == "You are EDDA."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([EXAMPLES / "play.txt", "--output", "x"], 'Add for example: --character "EDDA"'),
        ([EXAMPLES / "play.txt", "--output", "x", "--character", "Edna"], "Did you mean"),
        ([EXAMPLES / "play.txt"], "--output DIR"),
        ([EXAMPLES / "none.txt", "--output", "x"], "does not exist"),
        ([EXAMPLES / "play.txt", "--output", "x", "--val-ratio", "2"], "--val-ratio 2"),
        ([EXAMPLES / "play.txt", "--output", "x", "--seed", "1.5"], "--seed"),
        ([EXAMPLES / "play.txt", "--output", "x", "--format", "csv"], "invalid choice"),
        ([EXAMPLES / "messages.jsonl", "--output", EXAMPLES / "play.txt"], "is a file"),
    ],
)
def test_usage_errors(arguments, said):
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (ROOT / "x").exists()


CHANGED = {
    **{"characters": ("Edda", "艾达"), "user_name": "Ruth", "context_turns": 3, "max_exchanges": 2, "max_gap": 5.5},
    **{"leading_assistant": "keep", "narration": "brackets", "flat": True, "keep_quotes": True, "strip_speaker": True},
    **{"system": "You are here.", "val_ratio": 0.25, "seed": 3, "format": "dialogue", "encoding": "gb18030"},
    **{"lore_apart": True, "lore_weight": 2.5, "background": ("往事",), "drop_lines": ("marks",)},
    **{"prompt_col": "q", "response_col": "a", "context_col": "c", "split": "train", "lenient": True, "redact": True},
    **{"fix_text": True, "merge_consecutive": True, "allow_empty_user": True, "tools": "drop"},
    **{"role_map": {"甄嬛": "assistant"}, "max_chars": 500, "too_long": "split", "min_chars": 2, "keep_dups": True},
    **{"max_reject": 0.5, "max_record": 0.5, "templates": {"continue": 1.0, "expand": 0.5, "rewrite": 0.0}},
    **{"author_prompt": "你是作者。", "chunk_tokens": (40, 120), "tokenizer": "a model"},
}


def written(value):
    """The texts that say `value` on the command line."""
    if isinstance(value, dict):
        return [json.dumps(value) if "甄嬛" in value else ",".join(f"{name}={part}" for name, part in value.items())]
    if value == (40, 120):
        return ["40-120"]
    return [str(part) for part in value] if isinstance(value, tuple) else [str(value)]


def test_every_option_is_a_flag_with_help_and_survives_being_saved():
    assert CHANGED.keys() == Options.model_fields.keys() - {"load_tokenizer"}
    flags = {action.dest: action for action in parser("")._actions if action.help != "==SUPPRESS=="}
    line = []
    for name, value in CHANGED.items():
        assert flags[name].help
        assert value != Options.model_fields[name].default
        flag = flags[name].option_strings[0]
        line += [flag] if value is True else [part for text in written(value) for part in (flag, text)]
    assert command_options(line).model_dump(exclude={"load_tokenizer"}) == CHANGED
    saved = json.loads(json.dumps(choose(CHANGED).model_dump(mode="json")))
    assert saved.keys() == CHANGED.keys()
    assert choose(saved) == choose(CHANGED)


def command_options(line):
    arguments = parser("").parse_args(["x", "--output", "y", *line])
    return command_of(arguments, lambda model: (str(model), lambda text: [])).options


def test_a_report_repeats_its_conversion(tmp_path):
    source = tmp_path / "谈话 1.txt"
    source.write_bytes((EXAMPLES / "dialogue_zh.txt").read_bytes())
    options = [
        "--character",
        "艾达",
        "--context-turns",
        "2",
        "--flat",
        "--val-ratio",
        "0.4",
        "--system",
        "你是{character}。",
    ]
    assert run(source, *options, "--output", tmp_path / "a").returncode == 0
    names = ("train.jsonl", "val.jsonl", "rejected.jsonl", "report.json")
    first = [(tmp_path / "a" / name).read_bytes() for name in names]
    report = tmp_path / "a" / "report.json"
    for output in (["--output", tmp_path / "b"], []):  # elsewhere, and then in the same place
        done = run("--from", report, *output)
        assert done.returncode == 0, done.stderr
        assert first == [(tmp_path / "b" / name).read_bytes() for name in names]
        report = tmp_path / "b" / "report.json"
    done = run("--from", report, "--output", tmp_path / "c", "--no-flat", "--seed", "5")
    assert done.returncode == 0, done.stderr
    changed = json.loads((tmp_path / "c" / "report.json").read_text("utf-8"))["options"]
    assert changed == json.loads(first[3])["options"] | {"flat": False, "seed": 5}
    assert (tmp_path / "c" / "train.jsonl").read_bytes() != first[0]
    source.unlink()
    done = run("--from", report)
    assert done.returncode == 2
    assert "谈话 1.txt does not exist" in done.stderr


def test_a_system_prompt_that_begins_with_an_at_sign_is_repeated_as_text(tmp_path):
    (tmp_path / "at.txt").write_text("@everyone hi\n", encoding="utf-8")
    source = (EXAMPLES / "play.txt", "--character", "EDDA")
    assert run(*source, "--system", f"@{tmp_path / 'at.txt'}", "--output", tmp_path / "a").returncode == 0
    done = run("--from", tmp_path / "a" / "report.json", "--output", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    for name in ("train.jsonl", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    missing = run(*source, "--system", "@everyone hi", "--output", tmp_path / "c")
    assert missing.returncode == 2
    assert "everyone hi does not exist. Name a text file" in missing.stderr


def test_a_repetition_reads_the_same_files_and_says_which_have_changed(tmp_path):
    """A folder is converted into itself; its results and new files are no part of the repetition."""
    folder, report = tmp_path / "d", tmp_path / "d" / "report.json"
    folder.mkdir()
    rows = [{"instruction": f"q{n}", "output": f"r{n}"} for n in range(20)]
    for name, part in (("a.json", rows[:10]), ("b.json", rows[10:])):
        (folder / name).write_text(json.dumps(part), encoding="utf-8")
    assert run(folder, "--output", folder).returncode == 0
    first = [(folder / name).read_bytes() for name in ("train.jsonl", "val.jsonl")]
    (folder / "new.json").write_text('[{"instruction": "new", "output": "new"}]', encoding="utf-8")
    for output in ([], ["--output", tmp_path / "e"]):
        done = run("--from", report, *output)
        assert done.returncode == 0, done.stderr
        assert "new.json: not a part of the conversion that is repeated" in done.stdout
        assert "note: changed" not in done.stdout
        made = output[-1] if output else folder
        assert first == [(made / name).read_bytes() for name in ("train.jsonl", "val.jsonl")]
    (folder / "a.json").write_text(json.dumps(rows[:9]), encoding="utf-8")
    (folder / "b.json").unlink()
    done = run("--from", tmp_path / "e" / "report.json", "--val-ratio", "0")
    assert done.returncode == 0, done.stderr
    assert "note: changed since the earlier conversion, so the result may differ: a.json, b.json" in done.stdout
    assert "note: changed" not in run("--from", report, folder / "a.json", "--preview", "1").stdout


@pytest.mark.parametrize("from_file", [False, True])
def test_a_repetition_for_another_character_fills_its_name_in(tmp_path, from_file):
    file = tmp_path / "系统 prompt.txt"
    file.write_text("  You are {character}, a keeper.\r\n", encoding="utf-8")
    system = f"@{file}" if from_file else "You are {character}, a keeper."
    first = run(EXAMPLES / "play.txt", "--character", "EDDA", "--system", system, "--output", tmp_path / "a")
    assert first.returncode == 0, first.stderr
    file.unlink()  # the report holds its text
    other = run("--from", tmp_path / "a" / "report.json", "--character", "INSPECTOR", "--output", tmp_path / "b")
    assert other.returncode == 0, other.stderr
    for folder, name in (("a", "EDDA"), ("b", "INSPECTOR")):
        report = json.loads((tmp_path / folder / "report.json").read_text("utf-8"))
        assert report["options"]["system"] == "You are {character}, a keeper."
        assert report["system_prompt"] == f"You are {name}, a keeper."
        for line in (tmp_path / folder / "train.jsonl").read_text("utf-8").splitlines():
            assert json.loads(line)["messages"][0] == {"role": "system", "content": f"You are {name}, a keeper."}


def test_a_name_that_cannot_be_in_a_system_prompt_is_refused():
    done = run(EXAMPLES / "play.txt", "--character", "<|im_end|>", "--system", "You are {character}.", "--preview", "1")
    assert done.returncode == 2
    assert '--system: found the control token "<|im_end|>"' in done.stderr


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ("{}", "it does not say how it was made"),
        ("[", "not valid JSON"),
        ('{"inputs": ["a.txt"], "options": {"val_ratio": 3, "flt": true}}', "--val-ratio 3: give a number"),
        ('{"inputs": ["a.txt"], "options": {"val_ratio": 3, "flt": true}}', "flt is not an option"),
        ('{"inputs": ["a.txt"], "options": {"format": "pdf"}}', "--format pdf"),
        ('{"inputs": ["a.txt"], "options": {"drop_lines": 5, "chunk_tokens": {}, "templates": 1}}', "--templates 1"),
    ],
)
def test_a_report_that_cannot_be_repeated(tmp_path, report, said):
    path = tmp_path / "report.json"
    path.write_text(report, encoding="utf-8")
    done = run("--from", path, "--preview", "1")
    assert done.returncode == 2
    assert said in done.stderr


def test_old_names_of_flags_are_answered_with_the_new_ones():
    for old, new in (("--settings", "--lore"), ("--settings-weight=2", "--lore-weight")):
        done = run("x", old)
        assert done.returncode == 2
        assert f"{old.partition('=')[0]} is {new} now" in done.stderr


def test_preview_writes_nothing(tmp_path):
    done = run(EXAMPLES / "sharegpt.json", "--preview", "1", "--output", tmp_path / "out")
    assert done.returncode == 0
    assert "assistant  Once. The gulls still talk about it." in done.stdout
    assert "record 2" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_preview_shows_text_that_would_steer_the_terminal(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "a\u202eb", "output": "c\x9bd"}]), encoding="utf-8")
    done = run(path, "--preview", "1")
    assert "\\u202e" in done.stdout
    assert "\x9b" not in done.stdout


def test_too_many_rejections_still_write_the_good_ones(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "c"}]), encoding="utf-8")
    done = run(path, "--output", tmp_path / "out")
    assert done.returncode == 3
    assert "1 of 2 records (50.0 %) were rejected" in done.stderr
    assert "$[1].output" in done.stdout
    assert (tmp_path / "out" / "train.jsonl").is_file()
    assert run(path, "--output", tmp_path / "out", "--max-reject", "0.5").returncode == 0


def test_nothing_usable_writes_no_training_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n', encoding="utf-8")
    done = run(path, "--output", tmp_path / "out")
    assert done.returncode == 3
    assert "No record could be used" in done.stderr
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "rejected.jsonl",
        "report.html",
        "report.json",
    ]


def test_a_broken_file_is_named_and_nothing_is_written(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},]', encoding="utf-8")
    done = run(path, "--output", tmp_path / "out")
    assert done.returncode == 3
    assert "a.json:1:11  a comma before a closing bracket. delete the last comma." in done.stderr
    assert not (tmp_path / "out").exists()


def test_check_reports_on_converted_files(tmp_path):
    data = ROOT / "data" / "tamsin"
    done = run("--check", data / "train.jsonl", data / "val.jsonl", data / "lore.jsonl")
    assert done.returncode == 0, done.stderr
    assert "train.jsonl: 156 records (dialogue 156), 0 of them repetitions" in done.stdout
    assert "no group, conversation or reply is both in training and in validation" in done.stdout
    for name in ("train.jsonl", "val.jsonl"):
        (tmp_path / name).write_bytes((data / "val.jsonl").read_bytes())
    done = run("--check", tmp_path)
    assert done.returncode == 3
    assert "17 conversations are both in training and in validation" in done.stderr


def test_the_page_is_self_contained_and_shows_text_as_text(tmp_path):
    path = tmp_path / "a.json"
    rows = [{"instruction": f"<script>alert({n})</script>", "output": f"<b>{n}</b>"} for n in range(30)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert run(path, "--output", tmp_path / "out").returncode == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "http:" not in page
    assert "https:" not in page
    assert "&lt;b&gt;" in page
    for words in ("30 records read = 30 written", "Advice", "Length of records", "Languages", "Examples"):
        assert words in page


def test_repairs_are_asked_for_and_listed(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"instruction": "call 13812345678", "output": "yes"},] // end', encoding="utf-8")
    assert run(path, "--output", tmp_path / "out").returncode == 3
    done = run(path, "--output", tmp_path / "out", "--lenient", "--redact")
    assert done.returncode == 0, done.stderr
    assert "comma before a closing bracket dropped" in done.stdout
    assert "personal data masked: phone" in done.stdout
    assert "[phone]" in (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8")


def test_articles_by_the_command_line(tmp_path, tiny_model):
    done = run(
        EXAMPLES / "articles", "--tokenizer", tiny_model, "--chunk-tokens", "40-200", "--output", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "sft_train.jsonl").is_file()
    stats = json.loads((tmp_path / "out" / "dataset_stats.json").read_text(encoding="utf-8"))
    assert stats["total_articles"] == 3
    assert stats["chunks_outside"] == 0
