"""The script as a person runs it: exit codes, what is printed, what is left on disk."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "data" / "examples"


def run(*arguments):
    command = [sys.executable, str(ROOT / "convert_dataset.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=60)
    assert "Traceback" not in done.stderr
    return done


def test_help_is_quick_and_loads_nothing_heavy():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("--help")
        times.append(time.perf_counter() - start)
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
    assert "no group, conversation or reply stands both in training and in validation" in done.stdout
    for name in ("train.jsonl", "val.jsonl"):
        (tmp_path / name).write_bytes((data / "val.jsonl").read_bytes())
    done = run("--check", tmp_path)
    assert done.returncode == 3
    assert "17 conversations stand both in training and in validation" in done.stderr


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
