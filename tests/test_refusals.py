"""What a person types or brings by mistake, at every script: the right exit code, words that help, no traceback."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from persona.console import run_script
from persona.errors import UsageError
from persona.files import MARKER, check_file, check_folder, fault_in, read_json, whole_json

ROOT = Path(__file__).parents[1]
LONG = "x" * 300  # longer than a file's name may be on any system
DEEP = "[" * 100_000
TALK = ROOT / "data" / "examples" / "dialogue_en.txt"
CONVERT = ("convert_dataset", TALK, "--character", "Edda")
DATA = ROOT / "data" / "tamsin"
KEY = {"format": "ab-key-1", "sheet": "s", "names": ["a", "b"], "identical": []}
KEY |= {"pairs": [{"id": "p", "prediction": 0, "left": "a", "right": "b"}]}
ANSWERS = {"format": "ab-answers-1", "sheet": "s", "rater": "r"}
ANSWERS |= {"answers": [{"id": "p", "choice": "left", "comment": "half \ud83d"}]}


def report_with(**options):
    return json.dumps({"inputs": [str(TALK)], "options": options})


FILES = {
    "file": "text",
    "deep.json": DEEP,
    "deep.jsonl": DEEP + "\n{}",
    "nested.json": "[" * 200 + "]" * 200,
    "digits.jsonl": f'{{"step": 1, "train/loss": 1{"0" * 400}}}\n{{"step": 2, "train/loss": 2.5}}\n',
    "step.jsonl": f'{{"step": 1{"0" * 400}, "train/loss": 1}}\n',
    "one.json": '[{"input": "q", "predict": "a"}]',
    "two.json": '[{"input": "q", "predict": "b"}]',
    "half.json": '[{"input": "q", "predict": "half \\ud83d"}]',
    "twice.txt": '[{"predict": "a", "predict": "b"}]',
    "replies.txt": "Aye.\nNo.\n",
    "key.json": json.dumps(KEY),
    "key_infinite.json": json.dumps(KEY).replace('"prediction": 0', '"prediction": 1e400'),
    "key_list.json": json.dumps(KEY).replace('"left": "a"', '"left": ["a"]'),
    "answers.json": json.dumps(ANSWERS),
    **{
        f"{number}/report.json": text
        for number, text in enumerate(
            [
                report_with(chunk_tokens=[1, 800]).replace("[1,", "[1e400,"),
                report_with(chunk_tokens=[1, 800]).replace("[1,", "[Infinity,"),
                report_with(chunk_tokens=[300.7, 800.2]),
                report_with(chunk_tokens={"300": 1, "800": 2}),
                report_with(drop_lines=None),
                report_with(drop_lines={}),
                report_with(templates={"continue": True}),
                '{"inputs": 5, "options": {}}',
                '{"inputs": ["a"], "options": {}, "files": [1]}',
                '{"inputs": ["a"], "options": {"system": ' + "[" * 300 + "]" * 300 + "}}",
            ]
        )
    },
}
RANGE, KINDS = "--chunk-tokens", "give some of thoughts, notes, silence, marks"
FROM = ("convert_dataset", "--preview", "1", "--from")

CASES = [
    ((*FROM, "0/report.json"), 2, f"{RANGE} [Infinity, 800]: give two whole numbers"),
    ((*FROM, "1/report.json"), 2, f"{RANGE} [Infinity, 800]: give two whole numbers"),
    ((*FROM, "2/report.json"), 2, f"{RANGE} [300.7, 800.2]: give two whole numbers"),
    ((*FROM, "3/report.json"), 2, RANGE),
    ((*FROM, "4/report.json"), 2, f"--drop-lines null: {KINDS}"),
    ((*FROM, "5/report.json"), 2, f"--drop-lines {{}}: {KINDS}"),
    ((*FROM, "6/report.json"), 2, "weights from 0 to 1"),
    ((*FROM, "7/report.json"), 2, "does not say how it was made"),
    ((*FROM, "8/report.json"), 2, "does not say how it was made"),
    ((*FROM, "9/report.json"), 2, "nested deeper than 64 levels"),
    ((*FROM, "deep.json"), 2, "nested too deeply"),
    ((*FROM, LONG), 2, "File name too long"),
    ((*CONVERT, "--output", "out", RANGE, "100 - 200"), 2, "300-800"),
    ((*CONVERT, "--output", "out", RANGE, "1_00-2_00"), 2, "300-800"),
    ((*CONVERT, "--output", "out", "--tokenizer", LONG), 2, f"{LONG[:70]}"),
    ((*CONVERT, "--output", "out", "--system", f"@{LONG}"), 2, "does not exist"),
    ((*CONVERT, "--output", LONG), 2, "--output xxx"),
    ((*CONVERT, "--output", "file/x"), 2, "--output file/x cannot be a folder, since file is a file"),
    ((*CONVERT, "--check", "--preview", "0"), 2, "--preview 0"),
    ((*CONVERT, "--check", "--preview", "2"), 2, "--check shows no records"),
    *(
        ((*CONVERT, "--output", "out", "--encoding", name), 2, f"--encoding {name} is not known")
        for name in ("hex", "rot13", "base64", "zlib", "undefined")
    ),
    (("plot_loss", "digits.jsonl", "--save_path", "out.png"), 0, "1, where a loss is NaN or infinite"),
    (("plot_loss", "step.jsonl"), 3, '"step" must be a whole number'),
    (("plot_loss", "deep.json"), 3, "deep.json: not JSON"),
    (("plot_loss", "deep.jsonl"), 3, "deep.jsonl:1: not a line of JSON"),
    (("plot_loss", "/dev/null"), 2, "there is no such file or folder"),
    (("plot_loss", LONG), 2, "there is no such file or folder"),
    (("plot_loss", "digits.jsonl", "--save_path", f"{LONG}.png"), 2, "cannot be written"),
    (("evaluate_model", "ab-make", "one.json", "two.json", "--output", "file"), 2, "--output file cannot be a folder"),
    (("evaluate_model", "ab-make", "one.json", "two.json", "--output", "file/x"), 2, "since file is a file"),
    (("evaluate_model", "ab-make", "one.json", "two.json", "--output", LONG), 2, "File name too long"),
    (("evaluate_model", "ab-make", "one.json", "two.json", "--config", "nope"), 2, "--config"),
    (("evaluate_model", "ab-make", "one.json", "two.json", "--set", "foo"), 2, "--set"),
    (("evaluate_model", "ab-make", "one.json", "two.json", "--data", "nope"), 2, "--data"),
    (("evaluate_model", "ab-make", "one.json", "half.json"), 3, "half of a character"),
    (("evaluate_model", "ab-make", "one.json", "deep.json"), 3, "not JSON: Nested deeper"),
    (("evaluate_model", "ab-make", "one.json", "twice.txt"), 3, 'the key "predict" is there 2 times'),
    (("evaluate_model", "ab-score", "deep.json", "key.json"), 3, "broken JSON"),
    (("evaluate_model", "ab-score", "answers.json", "key.json"), 3, "half of a character"),
    (("evaluate_model", "ab-score", "answers.json", "deep.json"), 2, "is not a key"),
    (("evaluate_model", "ab-score", "answers.json", "key_infinite.json"), 2, "is not a key"),
    (("evaluate_model", "ab-score", "answers.json", "key_list.json"), 2, "is damaged"),
    *(
        (("evaluate_model", *words, "--data", DATA / "val.jsonl", "--set", f"data.train_file={LONG}"), code, says)
        for words, code, says in [
            (("predict", "replies.txt", "--output", "file"), 2, "--output file cannot be a folder"),
            (("predict", "replies.txt", "--output", "out"), 2, "--output does nothing for predict with a file of"),
            (("style", "replies.txt", "--limit", "2"), 2, "--limit does nothing for style"),
            (("style", "replies.txt", "--load-in-4bit"), 2, "--load-in-4bit does nothing"),
            *(
                ((verb, "replies.txt", "--batch-size", "8"), 2, f"--batch-size does nothing for {verb} with a file of")
                for verb in ("predict", "style", "report")
            ),
            (("report", "replies.txt", "--control", DATA / "val.jsonl"), 2, "--control does nothing"),
            (("style", "replies.txt", "--output", "out"), 2, "unrecognized arguments: --output"),
        ]
    ),
    (("finetune", "--set", f"data.train_file={LONG}"), 3, "does not exist. Make it with"),
    (("finetune", "--set", f"data.validation_file={LONG}"), 3, "does not exist. Make it with"),
    (("finetune", "--set", f"data.lore_file={LONG}"), 3, "does not exist. Make it with"),
    (("finetune", "--config", LONG), 2, "no such file"),
    *(
        (
            ("finetune", *words, "--resume", "never"),
            2,
            f"--resume never starts a run over, and {words[0]} trains nothing",
        )
        for words in (("--show", "2"), ("--dry-run",), ("--doctor",))
    ),
    *(
        (("finetune", "--doctor", *words), 2, "--doctor looks at the machine alone")
        for words in (("--show", "2"), ("--dry-run",), ("--set", "seed=1"))
    ),
    (("finetune", "--report", "out"), 2, "goes with --doctor"),
    (("merge_lora_to_fp16", "--compare-bases", "--no-verify"), 2, "--compare-bases measures both merges"),
    (("merge_lora_to_fp16", "--examples", "-1"), 2, "expected a whole number from 0, found '-1'"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files above and the sample's settings, where the scripts run."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "config", "config")
    shutil.copytree(DATA, "data/tamsin")
    return tmp_path


@pytest.mark.parametrize(("words", "code", "says"), CASES, ids=lambda value: "")
def test_a_mistake_has_its_exit_code_and_its_words(folder, monkeypatch, capsys, words, code, says):
    script, *arguments = map(str, words)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_script(importlib.import_module(script).main)
    out, error = capsys.readouterr()
    assert (ended.value.code, says in out + error) == (code, True), out + error
    assert not Path("out").exists()


# --- folders and files that cannot be written ------------------------------------------------------------------------


@pytest.mark.parametrize("check", [check_folder, check_file])
def test_a_path_that_can_be_written_passes(folder, check):
    for path in ("new", "new/deeper", folder / "新 夹", "1/new"):
        check(Path(path), "--output")
    check_folder(Path("1"), "--output")
    check_file(Path("file"), "--output")  # it is replaced


@pytest.mark.parametrize("name", ["1", "file/x", "file/x/y", LONG, f"{LONG}/x", "x" * 250])
def test_a_file_that_cannot_be_written_is_refused(folder, name):
    with pytest.raises(UsageError, match=f"^--card {name[:4]}"):
        check_file(Path(name), "--card")


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [DEEP, FILES["nested.json"], '{"a": ' * 200 + "1" + "}" * 200])
def test_deep_json_is_refused_by_every_reader(tmp_path, text):
    path = tmp_path / MARKER
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="nested"):
        read_json(path)
    with pytest.raises(ValueError, match="ested deeper"):
        whole_json(text)
    assert fault_in(tmp_path) == f"no readable {MARKER}"


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {"size": 1}}}'])
def test_a_marker_of_another_form_marks_nothing(tmp_path, text):
    (tmp_path / MARKER).write_text(text, encoding="utf-8")
    assert fault_in(tmp_path) == f"no readable {MARKER}"


@pytest.mark.parametrize("text", ["1e400", "NaN", '{"a": 1, "a": 2}', '"\\ud800"', '{"\\udfff": 1}', "1 2", ""])
def test_json_that_cannot_be_used_is_refused(text):
    with pytest.raises(ValueError, match=r"\w"):
        whole_json(f" {text}\n")
    assert whole_json(' {"a": "\\ud83d\\ude00"}\n') == {"a": "😀"}
