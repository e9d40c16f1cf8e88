"""evaluate_model.py from the command line to its files, on a run of the tiny model."""

import inspect
import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from making.evaluations import stored
from making.packs import tokens
from making.runs import config, conversations, write_jsonl

import persona.evaluate.loaded
from persona.config import dump_config
from persona.errors import DataError, OutOfMemory, UsageError
from persona.evaluate import command
from persona.evaluate import loaded as loaded_module
from persona.evaluate.blind.command import compare_blindly
from persona.evaluate.loaded import load
from persona.evaluate.page import report_page
from persona.evaluate.perplexity import example_losses, matrix, score
from persona.evaluate.predictions import read_predictions
from persona.evaluate.subject import read_controls, read_subject
from persona.records import read_records
from persona.speak.rounding import LEAST
from persona.train.run import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


def world(folder):
    """Lore of which one question has its facts given."""
    records = [
        {
            "messages": [
                {"role": "user", "content": f"Who is number {number}?"},
                {"role": "assistant", "content": f"Aye, that is Captain Herring{number}."},
            ],
            "meta": {"type": "lore_qa", "keywords": [f"Herring{number}"]},
        }
        for number in range(6)
    ]
    return write_jsonl(folder / "lore.jsonl", records)


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_model):
    """A folder with a finished run in outputs/tiny whose adapter has learned its lines."""
    folder = tmp_path_factory.mktemp("evaluate 评估")
    data = {"lore_file": str(world(folder))}
    made = config(
        folder,
        tiny_model,
        train=10,
        held_out=6,
        data=data,
        lora={"lora_dropout": 0, "r": 8, "lora_alpha": 16},
        training={"num_train_epochs": 4},
        generation={"max_new_tokens": 24, "temperature": 0.5},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finetune(made, True, lambda _: None)
    return folder


@pytest.fixture(autouse=True)
def there(monkeypatch, home):
    monkeypatch.chdir(home)


RUN = "outputs/tiny"


def subject_of(target=RUN, **options):
    given = {"settings": None, "overrides": [], "data": None, "output": None, "base_texts": None} | options
    return read_subject(target, **given)


def silent(_):
    """The progress of a step, shown to nobody."""
    return lambda *_: None


def lines():
    said = []
    return said, said.append


def test_score_agrees_with_the_run(home):
    said, report = lines()
    command.run_score([subject_of()], [], False, report)
    summary = json.loads((home / RUN / "run.json").read_text(encoding="utf-8"))["summary"]["held-out perplexity"]
    base, tuned = summary.split(" ")[0], summary.split(" ")[2]
    assert f"{base} (" in said[0]
    assert f"{tuned} (" in said[0]


def test_predictions_are_in_the_files_order_whatever_the_batch(home, tmp_path):
    found = {}
    for size in (1, 8):
        command.run_predict(subject_of(output=tmp_path / str(size)), False, size, lambda _: None)
        found[size] = [read_predictions(tmp_path / str(size) / f"predictions{side}.json") for side in ("", "_base")]
    assert found[1] == found[8]
    tuned, base = found[1]
    records = read_records(home / "val.jsonl")
    assert len(tuned) == len(base) == len(records) == 6
    for one, other, record in zip(tuned, base, records, strict=True):
        assert one.input == other.input == record.turns[-2]["content"]
        assert one.target == other.target == record.turns[-1]["content"]
    assert [one.predict for one in tuned] != [one.predict for one in base]


def test_when_the_memory_is_full_replies_are_written_in_halves(home, tmp_path, monkeypatch):
    command.run_predict(subject_of(output=tmp_path / "whole"), False, 4, lambda _: None)
    write, sizes, room = persona.evaluate.loaded.reply_to_all, [], 2

    def small(speaker, prompts, decoding, batch_size, *rest):
        sizes.append(batch_size)
        if batch_size > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return write(speaker, prompts, decoding, batch_size, *rest)

    monkeypatch.setattr(persona.evaluate.loaded, "reply_to_all", small)
    said, report = lines()
    command.run_predict(subject_of(output=tmp_path / "halves"), False, 4, report)
    assert sizes == [4, 2, 2]
    assert "going on with 2 replies at a time (--batch-size is 4)" in said[0]
    for name in ("predictions.json", "predictions_base.json"):
        assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    room = 0
    with pytest.raises(OutOfMemory, match=r"with a single reply\. Lower data\.max_length"):
        command.run_predict(subject_of(output=tmp_path / "none"), False, 4, report)


def test_when_the_memory_is_full_while_rounding_is_measured_replies_are_written_one_by_one(home, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    command.run_predict(subject_of(output=tmp_path / "whole"), False, 4, lambda _: None)
    monkeypatch.setattr(loaded_module, "rounding_of", full)
    said, report = lines()
    command.run_predict(subject_of(output=tmp_path / "one"), False, 4, report)
    assert "with 8 rows: replies are written one at a time" in said[0]
    assert (tmp_path / "one" / "rounding.json").as_posix() in said[0]
    assert len(json.loads((tmp_path / "one" / "predictions.json").read_text(encoding="utf-8"))) == 6
    for name in ("predictions.json", "predictions_base.json"):  # in float32 company changes none of them
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    said.clear()
    command.run_predict(subject_of(output=tmp_path / "one"), False, 4, report)  # it is kept
    assert "The memory is full" not in said[0]


def test_finished_replies_are_not_generated_again(home, tmp_path, monkeypatch):
    command.run_predict(subject_of(output=tmp_path), False, 4, lambda _: None)
    before = (tmp_path / "predictions.json").read_bytes()

    def never(*_):
        raise AssertionError("it generates again")

    monkeypatch.setattr("persona.speak.replies.generate", never)
    command.run_predict(subject_of(output=tmp_path), False, 2, lambda _: None)
    assert (tmp_path / "predictions.json").read_bytes() == before


def test_rounding_is_measured_once_for_a_model_and_a_device(home, tmp_path, monkeypatch):
    measured, original = [], loaded_module.rounding_of

    def counting(*args):
        measured.append(original(*args))
        return measured[-1]

    monkeypatch.setattr(loaded_module, "rounding_of", counting)
    path = tmp_path / "rounding.json"
    for size in (4, 1):
        command.run_predict(subject_of(output=tmp_path), False, size, lambda _: None)
    assert [one.margin for one in measured] == [LEAST]
    loaded = load(subject_of(output=tmp_path), False, 4, silent, writes=True, report=print)
    assert loaded.kept_rounding() == measured[0]
    for spoiled in ("", "[]", "{}", path.read_text("utf-8").replace("torch 2", "torch 1")):
        path.write_text(spoiled, encoding="utf-8")
        assert loaded.kept_rounding() is None
        assert loaded.rounding([[{"role": "user", "content": "Who?"}]], 8).margin == LEAST
        assert loaded.kept_rounding() == measured[-1]
    assert len(measured) == 5
    assert replace(loaded, identity="another").kept_rounding() is None
    assert replace(loaded, precision="bf16").kept_rounding() is None


def test_base_and_tuned_are_one_model_and_the_adapter_is_put_back(home):
    loaded = load(subject_of(), False, 4, silent, writes=True, report=print)
    held_out = loaded.subject.held_out
    first, second = (score(loaded, [held_out], silent)[0] for _ in range(2))
    assert first == second
    assert first.score.base.perplexity.value > 2 * first.score.tuned.perplexity.value


def test_on_a_cpu_it_writes_in_float32_and_scores_as_it_was_trained(home):
    subject = subject_of()
    training = subject.config.training.model_copy(update={"precision": "bf16"})
    subject = replace(subject, config=subject.config.model_copy(update={"training": training}))
    assert load(subject, False, 2, silent, writes=True, report=print).precision == "fp32"
    assert load(subject, False, 2, silent, writes=False, report=print).precision == "bf16"


def test_a_matrix_of_two_runs_has_its_lowest_figures_on_the_diagonal(home, tiny_model, tmp_path):
    """Two runs on different lines; each expects its own held-out file best."""
    other = tmp_path / "other"
    other.mkdir()
    records = conversations(16)
    for record in records:
        for message in record["messages"]:
            if message["role"] == "assistant":
                message["content"] = message["content"].upper()[::-1]
    made = config(
        other, tiny_model, lora={"lora_dropout": 0, "r": 8, "lora_alpha": 16}, training={"num_train_epochs": 4}
    )
    write_jsonl(other / "train.jsonl", records[:10])
    write_jsonl(other / "val.jsonl", records[10:])
    finetune(made, True, lambda _: None)
    control = write_jsonl(tmp_path / "neutral.jsonl", conversations(3))
    subjects = [subject_of(), subject_of(made.training.output_dir)]
    found = matrix(subjects, read_controls([control]), False, silent, print)
    assert found.models == ("tiny", "tiny", "base")
    rows = found.perplexity
    assert len(rows) == 3
    assert min(rows[0]) == rows[0][0]
    assert min(rows[1]) == rows[1][1]
    assert found.own == ("tiny", "tiny", None)
    said, report = lines()
    command.run_score(subjects, [], False, report)
    assert "2 of 2 held-out files" in said[0]


def test_a_checkpoint_and_the_adapter_itself_are_measured_like_the_run(home):
    whole = subject_of()
    alone = subject_of(f"{RUN}/adapter")
    checkpoint = subject_of(next(path.as_posix() for path in (home / RUN).glob("checkpoint-*")))
    assert (whole.run, whole.output) == (alone.run, alone.output)
    assert whole.run is not None
    assert checkpoint.run is None
    assert checkpoint.output.name.startswith("tiny-checkpoint")
    assert whole.held_out.system == "You keep the lamp."


def test_another_held_out_file_can_be_named(home, tmp_path):
    path = write_jsonl(tmp_path / "其他.jsonl", conversations(2))
    assert subject_of(data=path).held_out.path == path
    with pytest.raises(DataError, match="does not exist"):
        subject_of(data=tmp_path / "none.jsonl")


def test_texts_of_another_tool_are_measured_without_a_model(home, tmp_path):
    (home / "default.json").write_text(dump_config(config(tmp_path, tmp_path)), encoding="utf-8")
    target = tmp_path / "theirs.txt"
    records = read_records(home / "val.jsonl")
    target.write_text("\n".join(record.turns[-1]["content"] for record in records), encoding="utf-8")
    subject = subject_of(str(target), settings=home / "default.json", data=home / "val.jsonl")
    assert subject.kind == "texts"
    said, report = lines()
    command.run_predict(subject, False, 8, report)
    assert "100.0" in said[0]  # as many as the held-out conversations: they are replies to these
    with pytest.raises(UsageError, match="has no perplexity"):
        command.run_score([subject], [], False, report)


def test_a_merged_model_of_another_persona_is_not_measured_by_mistake(home, tiny_model, tmp_path):
    merged = shutil.copytree(tiny_model, tmp_path / "merged")
    card = json.loads((home / RUN / "adapter" / "persona.json").read_text(encoding="utf-8"))
    (merged / "persona.json").write_text(
        json.dumps(card | {"system_prompt": "You are someone else."}), encoding="utf-8"
    )
    settings = home / RUN / "config.json"
    with pytest.raises(UsageError, match="another system prompt"):
        subject_of(str(merged), settings=settings)
    subject = subject_of(str(merged), settings=settings, data=home / "val.jsonl")
    assert (subject.kind, subject.held_out.system) == ("model", "You are someone else.")


def test_training_data_that_is_gone_is_said(home, tmp_path):
    shutil.copytree(home / RUN, tmp_path / "run")
    values = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    values["data"]["train_file"] = str(tmp_path / "gone.jsonl")
    (tmp_path / "run" / "config.json").write_text(json.dumps(values), encoding="utf-8")
    subject = subject_of(str(tmp_path / "run"))
    assert any("gone.jsonl" in note for note in subject.notes)
    assert len(subject.trained) == 6  # the lore is still there


def test_the_report_holds_everything_and_every_part_agrees(home, tmp_path):
    control = write_jsonl(tmp_path / "neutral.jsonl", conversations(6))
    subject = subject_of(output=tmp_path / "report")
    said, report = lines()
    found = command.run_report(subject, read_controls([control]), False, 8, 3, report)
    assert stored(tmp_path / "report" / "evaluation.json") == found
    assert (found.name, found.kind, found.language, found.seed) == ("tiny", "adapter", "en", 0)
    assert [score.role for score in found.scores] == ["held_out", "control"]
    tuned, base = (read_predictions(tmp_path / "report" / f"predictions{side}.json") for side in ("", "_base"))
    assert [one.said.tuned for one in found.exchanges] == [one.predict for one in tuned]
    assert [one.said.base for one in found.exchanges] == [one.predict for one in base]
    assert found.replies.tuned.count == found.replies.base.count == 6
    assert len(found.recall.questions) == 3
    assert found.recall.facts_given
    assert all(one.trained for one in found.recall.questions)
    assert found.copying.side.tuned.share.value >= found.copying.side.base.share.value
    assert {finding.kind for finding in found.verdict} & {"best", "not_learned"}
    assert found.curve.held_out[0][0] == 0
    assert found.curve.best == found.curve.held_out[-1][0]
    assert found.settings["data"]["max_length"] == 256
    assert [one.file for one in found.data] == ["train.jsonl", "lore.jsonl", "val.jsonl"]
    assert {"base", "adapter", "val.jsonl"} <= found.hashes.keys()
    assert "sacrebleu" in found.versions
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert page == report_page(found)
    for i, one in enumerate(found.scores):
        for side in ("base", "tuned"):
            value = getattr(one.score, side).perplexity.value
            place = f"scores.{i}.score.{side}.perplexity.value"
            (shown,) = re.findall(rf'<data value="{value!r}" data-at="{place}">([^<]*)</data>', page)
            assert float(shown.replace(",", "")) == pytest.approx(value, rel=0.005), place
    again = command.run_report(subject, read_controls([control]), False, 2, 3, report)
    assert again == found  # of the finished replies, that is; another batch size is another test


def test_texts_are_reported_with_and_without_a_base(home, tmp_path):
    target, base = tmp_path / "theirs.txt", tmp_path / "before.txt"
    target.write_text("\n".join(f"Aye, I keep the lamp. Mind the tide, {i}." for i in range(40)), encoding="utf-8")
    base.write_text("\n".join(f"Hello, how can I help you on day {i}?" for i in range(40)), encoding="utf-8")
    author = write_jsonl(tmp_path / "author.jsonl", conversations(40))
    options = {"settings": home / RUN / "config.json", "data": author, "output": tmp_path / "out"}
    alone = command.run_report(subject_of(str(target), **options), [], False, 8, None, lambda _: None)
    assert (alone.kind, alone.scores, alone.recall, alone.curve) == ("texts", (), None, None)
    assert (alone.style.headline.value, alone.style.headline.reason) == (None, "no texts of a base model")
    assert alone.replies.base is None
    assert len(alone.style.distances) > 3
    both = command.run_report(subject_of(str(target), base_texts=base, **options), [], False, 8, None, lambda _: None)
    assert both.style.headline.value > 0.3
    assert both.style.headline.low is not None
    assert both.replies.base.chrf < both.replies.tuned.chrf
    pairs = [(one.distance.tuned.value, one.distance.base.value) for one in both.style.distances]
    assert sum(tuned < base for tuned, base in pairs) > len(pairs) / 2


def script(monkeypatch, *words):
    """The exit code of evaluate_model.py."""
    import evaluate_model
    from persona.console import run_script

    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        run_script(evaluate_model.main)
    return ended.value.code


def test_from_predictions_to_a_scored_sheet(home, tmp_path, monkeypatch, capsys):
    assert script(monkeypatch, "ab-make", RUN, "--output", tmp_path) == 2
    assert "evaluate_model.py predict" in capsys.readouterr().err
    assert script(monkeypatch, "predict", RUN, "--output", tmp_path) == 0
    assert script(monkeypatch, "ab-make", RUN, "--output", tmp_path) == 0
    key = json.loads((tmp_path / "ab_key.json").read_text(encoding="utf-8"))
    choices = [
        {"id": pair["id"], "choice": "left" if pair["left"] == "tuned" else "right", "comment": ""}
        for pair in key["pairs"]
    ]
    answers = tmp_path / "answers.json"
    answers.write_text(
        json.dumps({"format": "ab-answers-1", "sheet": key["sheet"], "rater": "a", "answers": choices}),
        encoding="utf-8",
    )
    assert script(monkeypatch, "ab-score", answers, tmp_path / "ab_key.json") == 0
    assert "tuned was preferred" in capsys.readouterr().out
    score = json.loads((tmp_path / "ab_score.json").read_text(encoding="utf-8"))
    assert score["overall"]["wins"] == len(choices)
    files = [tmp_path / name for name in ("predictions.json", "predictions_base.json")]
    assert script(monkeypatch, "ab-make", *files, "--output", tmp_path / "two", "--limit", "3") == 0
    other = json.loads((tmp_path / "two" / "ab_key.json").read_text(encoding="utf-8"))
    assert (other["names"], len(other["pairs"])) == (["predictions", "predictions_base"], 3)
    assert {len(one["seed"]) for one in (key, other)} == {64}
    assert key["seed"] != other["seed"], "every sheet has a secret of its own"
    for file in files:
        file.rename(home / RUN / file.name)
    assert script(monkeypatch, "ab-make", RUN, "--output", tmp_path / "apart") == 0, "the run's predictions are found"
    assert (tmp_path / "apart" / "ab_key.json").is_file()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("score", "nowhere", "--config", "outputs/tiny/config.json"), 2, "nowhere"),
        (("predict", "outputs/tiny", "outputs/tiny"), 2, "unrecognized arguments: outputs/tiny"),
        (("predict", "outputs/tiny", "--limit", "3"), 2, "unrecognized arguments: --limit"),
        (("score", "outputs/tiny", "--batch-size", "3"), 2, "unrecognized arguments: --batch-size"),
        (("style", "outputs/tiny", "--control", "none.jsonl"), 2, "unrecognized arguments: --control"),
        (("report", "outputs/tiny", "--limit", "some"), 2, "whole number from 1, found 'some'"),
        ((), 2, "required: VERB"),
        (("measure", "outputs/tiny"), 2, "invalid choice: 'measure'"),
        (("score", "outputs/tiny", "--data", "none.jsonl"), 3, "none.jsonl"),
        (("report", "outputs/tiny", "--control", "none.jsonl"), 3, "none.jsonl"),
        (("report", "outputs/tiny", "--batch-size", "0"), 2, "whole number from 1, found '0'"),
        (
            ("report", "outputs/tiny", "--base-texts", "replies.txt"),
            2,
            "--base-texts does nothing for report",
        ),
        (("score", "outputs/tiny", "--load-in-4bit"), 2, "--load-in-4bit does nothing for score with an adapter"),
        (("ab-score", "one.json"), 2, "required: KEY"),
        (("ab-score", "one.json", "none_key.json"), 2, "none_key.json cannot be read"),
        (("ab-make", "a", "b", "c"), 2, "two files"),
    ],
)
def test_a_mistake_is_named_and_no_traceback_is_shown(home, monkeypatch, capsys, words, code, says):
    (home / "replies.txt").write_text("Aye.\n" * 6, encoding="utf-8")
    assert script(monkeypatch, *words) == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error


OPTIONS = {
    "score": {"--data", "--control", "--config", "--set", "--load-in-4bit"},
    "predict": {"--data", "--base-texts", "--batch-size", "--output", "--config", "--set", "--load-in-4bit"},
    "style": {"--data", "--base-texts", "--batch-size", "--limit", "--config", "--set", "--load-in-4bit"},
    "report": {"--data", "--control", "--base-texts", "--batch-size", "--limit", "--output", "--config", "--set"}
    | {"--load-in-4bit"},
    "ab-make": {"--data", "--limit", "--output", "--config", "--set"},
    "ab-score": set(),
}


@pytest.mark.parametrize("verb", OPTIONS)
def test_the_help_of_a_verb_has_the_options_that_it_takes_and_no_other(monkeypatch, capsys, verb):
    assert script(monkeypatch, "--help") == 0
    assert re.search(rf"^    {verb} +\S", capsys.readouterr().out, re.MULTILINE)
    assert script(monkeypatch, verb, "--help") == 0
    text = capsys.readouterr().out
    assert set(re.findall(r"^  (--[a-z0-9-]+)", text, re.MULTILINE)) == OPTIONS[verb]
    if verb == "ab-score":
        return
    passed = {"paths": None if verb in ("predict", "style", "report") else []}
    for option in OPTIONS[verb]:
        passed[{"--set": "overrides"}.get(option, option[2:].replace("-", "_"))] = None
    if verb == "ab-make":
        assert passed.keys() | {"report"} == set(inspect.signature(compare_blindly).parameters)
    else:
        command.Request(verb, **passed)  # each option of the script is one of a request


def test_a_model_that_is_broken_is_said_to_be(home, fmt_examples):
    loaded = load(subject_of(), False, 4, silent, writes=True, report=print)
    with torch.no_grad():
        loaded.speaker.model.get_output_embeddings().weight.fill_(float("nan"))
    from persona.errors import Diverged

    with pytest.raises(Diverged, match="not finite"):
        example_losses(loaded.speaker.model, fmt_examples(loaded), tokens(512), "fp32", False)


@pytest.fixture
def fmt_examples():
    from persona.model.dataset import render_records

    return lambda loaded: render_records(loaded.subject.held_out.records, loaded.speaker.fmt, None, 256).examples
