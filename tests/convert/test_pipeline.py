"""The whole way: duplicates, order, split, idempotence, warnings, files written; and that no input breaks it."""

import json
import random
from pathlib import Path

import pytest
from making.converting import convert_paths as convert

from persona.convert.command import choose, command_of, parser
from persona.convert.inputs import find_sources
from persona.convert.pipeline import check_output
from persona.convert.report import describe, next_command, preview, verdict
from persona.errors import DataError, UsageError
from persona.records import read_records

EXAMPLES = Path(__file__).parents[2] / "data" / "examples"
EXPECTED = {  # file: (character, records, learned speeches)
    "sharegpt.json": (None, 3, None),
    "sharegpt.jsonl": (None, 3, None),
    "alpaca.json": (None, 3, None),
    "messages.jsonl": (None, 2, None),
    "dialogue_en.txt": ("Edda", 2, 4),
    "dialogue_zh.txt": ("艾达", 2, 5),
    "play.txt": ("edda", 2, 3),
    "table.csv": (None, 3, None),
    "table.tsv": (None, 2, None),
    "table_gb18030.csv": (None, 2, None),
    "questions.jsonl": (None, 2, None),
    "pairs.jsonl": (None, 2, None),
    "utterances.jsonl": ("艾达", 1, 2),
    "utterance_lists.jsonl": ("Edda", 2, 2),
    "lines.json": ("艾达", 5, 5),
    "sillytavern.jsonl": (None, 1, 2),
    "card.json": (None, 5, None),
    "card.png": (None, 3, None),
    "wechat.csv": ("我", 2, 3),
    "qq.txt": ("艾达", 2, 2),
    "discord.json": ("Edda", 1, 1),
    "telegram.json": ("Edda", 1, 1),
    "whatsapp.txt": ("Edda", 2, 2),
    "chatgpt.json": (None, 1, None),
    "articles": (None, 24, None),
}


def tokenizer():
    """A tokenizer whose tokens are the characters."""
    return "characters", lambda text: [(place, place + 1) for place in range(len(text))]


SMALL = {"tokenizer": tokenizer, "chunk_tokens": (30, 90)}


def rows(count, prompt="question {}"):
    return [{"instruction": prompt.format(number), "output": f"answer {number}"} for number in range(count)]


def write(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return path


def test_there_is_an_expectation_for_every_example():
    assert {path.name for path in EXAMPLES.iterdir()} == {*EXPECTED, "README.md"}
    described = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in described or f"`{name}/`" in described for name in EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_examples(name, tmp_path):
    character, count, learned = EXPECTED[name]
    conversion = convert(EXAMPLES / name, output=tmp_path, characters=(character,) if character else (), **SMALL)
    report = conversion.report
    assert (report["read"], report["written"], report["rejected"], report["duplicates"]) == (count, count, 0, 0)
    assert (report["speeches"] or {}).get("learned") == learned
    assert name in describe(conversion.outcome, conversion.shown)
    assert "assistant" in preview(conversion.records[:1], count)
    again = convert(*(path for path in tmp_path.glob("*.jsonl") if path.stem != "rejected"), val_ratio=0)
    assert {record.encoded() for record in again.records} == {record.encoded() for record in conversion.records}


def test_converting_the_output_changes_no_byte(tmp_path):
    convert(EXAMPLES, output=tmp_path / "a", characters=("Edda", "艾达", "我"), val_ratio=0, **SMALL)
    convert(tmp_path / "a", output=tmp_path / "b", val_ratio=0)
    first = (tmp_path / "a" / "train.jsonl").read_bytes()
    assert first == (tmp_path / "b" / "train.jsonl").read_bytes()
    unique = sum(count for _, count, _ in EXPECTED.values())
    assert first.count(b"\n") == unique + 4 * 5, "five lore records stand five times"


def test_same_input_same_bytes_and_the_order_of_rows_does_not_matter(tmp_path):
    data = rows(50)
    outputs = []
    for number, listed in enumerate((data, data, random.Random(1).sample(data, 50))):
        folder = tmp_path / str(number)
        folder.mkdir()
        convert(write(folder / "in.json", listed), output=folder, seed=7)
        outputs.append({name: (folder / name).read_bytes() for name in ("train.jsonl", "val.jsonl", "report.json")})
        outputs[-1]["report.json"] = outputs[-1]["report.json"].replace(json.dumps(str(folder))[1:-1].encode(), b"DIR")
    assert outputs[0] == outputs[1]
    prompts = [[json.loads(line)["messages"] for line in read_lines(tmp_path / str(n))] for n in (0, 2)]
    assert sorted(map(str, prompts[0])) == sorted(map(str, prompts[1]))
    assert prompts[0] != [messages for messages in sorted(prompts[0], key=str)], "the order is shuffled"
    orders = [
        [r.turns[0]["content"] for r in convert(tmp_path / "0" / "in.json", seed=s, val_ratio=0).train] for s in (7, 8)
    ]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def read_lines(folder):
    return [line for name in ("train.jsonl", "val.jsonl") for line in (folder / name).read_text("utf-8").splitlines()]


def test_duplicates_are_found_after_folding_and_before_the_split(tmp_path):
    data = [
        {"instruction": "Cafe\u0301  now", "output": "yes"},
        {"instruction": "Caf\u00e9\nnow", "output": "yes"},
        {"instruction": "Caf\u00e9 now", "output": "no"},
        {"instruction": "Caf\u00e9 now", "output": "yes", "system": "Be."},
    ]
    conversion = convert(write(tmp_path / "a.json", data))
    assert (conversion.report["written"], conversion.report["duplicates"]) == (3, 1)
    assert conversion.records[0].messages[0]["content"] == "Cafe\u0301  now", "what is kept stays as it was"


def test_the_split_never_tears_a_scene(tmp_path):
    text = "\n".join(
        f"SCENE {scene}\n" + "\n".join(f"A: {scene} q{n}\nB: {scene} r{n}" for n in range(30)) for scene in range(1, 11)
    )
    conversion = convert(write(tmp_path / "a.txt", text), characters=("B",), val_ratio=0.2)
    groups = [{record.meta["group"] for record in side} for side in (conversion.train, conversion.validation)]
    assert (len(groups[0]), len(groups[1])) == (8, 2)
    assert groups[0].isdisjoint(groups[1])
    assert len(conversion.records) == 40


def test_files_of_one_name_keep_their_groups_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.json", [{"instruction": folder, "output": "ok"}])
    conversion = convert(tmp_path)
    assert [record.meta["group"] for record in conversion.records] == ["a.json#1", "a.json~2#1"]
    assert {record.meta["source"] for record in conversion.records} == {"a.json"}
    assert str(tmp_path).encode() not in conversion.records[0].encoded()


def test_folders_leave_out_reports_and_say_so(tmp_path):
    write(tmp_path / "b.json", rows(1))
    write(tmp_path / "a.json", rows(2))
    for name in ("report.json", "rejected.jsonl", "README.md", ".hidden"):
        write(tmp_path / name, "{}")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00" + b"\xff\x01jpeg" * 40)
    write(tmp_path / "notes.txt", "Buy milk.")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00")
    sources, skipped = find_sources([str(tmp_path), str(tmp_path / "a.json")])
    conversion = convert(tmp_path, tmp_path / "a.json", output=tmp_path / "out", val_ratio=0)
    assert len(sources) == 5
    assert len(skipped) == 4
    assert [entry["file"] for entry in conversion.report["files"]] == ["a.json", "b.json"]
    said = describe(conversion.outcome, {})
    for name in ("report.json", "rejected.jsonl", "README.md", ".hidden", "photo.png", "photo.jpg", "notes.txt"):
        assert f"{name}: " in said
    with pytest.raises(DataError, match="picture is damaged"):
        convert(tmp_path / "photo.png")


def test_all_unreadable_files_are_named_at_once(tmp_path):
    for name in ("a.json", "b.json"):
        write(tmp_path / name, "[{")
    with pytest.raises(DataError) as caught:
        convert(tmp_path)
    assert "a.json:1:3" in str(caught.value)
    assert "b.json:1:3" in str(caught.value)


def test_warnings(tmp_path):
    same = convert(write(tmp_path / "a.json", rows(30, prompt="speak"))).report["warnings"]
    assert len(same) == 1
    assert "30 of 30 records begin with the same prompt ('speak')" in same[0]
    assert not convert(write(tmp_path / "b.json", rows(30))).report["warnings"]
    few = convert(write(tmp_path / "c.json", rows(5, prompt="I am {{{{name}}}} \ufffd {}"))).report["warnings"]
    assert [
        any(part in line for line in few)
        for part in ("Only 5 records", "5 of 5 records hold placeholders ({{name}})", "U+FFFD")
    ] == [True] * 3
    five = convert(write(tmp_path / "e.json", rows(5, prompt="speak"))).report["warnings"]
    assert not any("same prompt" in line for line in five), "a share of so few says nothing"
    one = convert(write(tmp_path / "d.txt", "A: x\nB: y"), characters=("B",)).report["warnings"]
    assert any("no validation part" in line for line in one)


def test_what_is_written(tmp_path):
    data = [*rows(40), {"instruction": "x", "output": "</s>"}]
    conversion = convert(write(tmp_path / "in.json", data), output=tmp_path / "out")
    assert conversion.names == ["train.jsonl", "val.jsonl", "rejected.jsonl", "report.json", "report.html"]
    assert read_records(tmp_path / "out" / "train.jsonl") == conversion.train
    assert read_records(tmp_path / "out" / "val.jsonl") == conversion.validation
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert (report["train"], report["val"], report["rejected_by_code"]) == (36, 4, {"CONTROL_TOKEN": 1})
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert list(rejected[0]) == ["file", "line", "path", "code", "reason", "fix", "excerpt"]
    convert(tmp_path / "in.json", output=tmp_path / "out", val_ratio=0)
    assert not (tmp_path / "out" / "val.jsonl").exists(), "a stale one would belong to other training data"


def trains(folder, validation="val.jsonl", lore_weight=None):
    return next_command(Path(folder), "train.jsonl", validation, lore_weight)


def test_the_next_command_leaves_nothing_of_the_sample_in_force(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rest = "--set data.lore_file=null --set data.system_prompt=null --set training.output_dir=outputs/mine"
    train = "python finetune.py --set data.train_file=data/mine/train.jsonl --set data.validation_file="
    assert trains("data/mine") == f"{train}data/mine/val.jsonl {rest}"
    assert trains("data/mine", None) == f"{train}null {rest}"
    assert '--set "data.train_file=my data/train.jsonl"' in trains("my data")
    assert "data.lore_file=data/mine/lore.jsonl" in trains("data/mine", lore_weight=2.5)
    assert "data.lore_weight=2.5" in trains("data/mine", lore_weight=2.5)


@pytest.mark.parametrize(
    ("settings", "command"),
    [("default", "python finetune.py"), ("chinese", "python finetune.py --config config/chinese.json")],
)
def test_the_samples_have_their_lore_already(monkeypatch, settings, command):
    monkeypatch.chdir(EXAMPLES.parent.parent)
    trained = json.loads(Path(f"config/{settings}.json").read_text("utf-8"))["data"]["train_file"]
    assert trains(Path(trained).parent) == command
    assert "validation_file=null" in trains(Path(trained).parent, None)


@pytest.mark.parametrize(("sample", "character"), [("tamsin", "Tamsin"), ("moyanqiu", "墨砚秋")])
def test_converting_a_sample_again_gives_the_files_that_are_here(tmp_path, sample, character):
    data = EXAMPLES.parent / sample
    convert(data / "dialogue.txt", output=tmp_path, characters=(character,))
    for name in ("train.jsonl", "val.jsonl"):
        assert (tmp_path / name).read_bytes() == (data / name).read_bytes()


def test_verdict_at_the_border(tmp_path):
    bad = {"instruction": "x", "output": ""}
    five = convert(write(tmp_path / "a.json", [*rows(19), bad])).outcome.counts
    assert verdict(five, 0.05) is None
    assert "1 of 20 records (5.0 %)" in (verdict(five, 0.04) or "")
    none = convert(write(tmp_path / "b.json", [bad])).outcome.counts
    assert "No record could be used" in (verdict(none, 1) or "")


def test_output_must_not_destroy_an_input(tmp_path):
    write(tmp_path / "train.jsonl", rows(1))
    sources, _ = find_sources([str(tmp_path)])
    with pytest.raises(UsageError, match="is an input"):
        check_output(tmp_path, sources)
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "train.jsonl", sources)
    check_output(tmp_path / "new", sources)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"val_ratio": 1.0}, "--val-ratio 1"),
        ({"val_ratio": float("nan")}, "--val-ratio nan"),
        ({"max_reject": -1}, "--max-reject"),
        ({"context_turns": 0}, "--context-turns 0"),
        ({"max_exchanges": -3}, "--max-exchanges -3"),
        ({"characters": (" ",)}, "--character"),
        ({"system": " "}, "--system is empty"),
        ({"system": "You are {character}."}, "add --character"),
        ({"system": "a <|im_end|>"}, "<|im_end|>"),
    ],
)
def test_options_out_of_bounds(options, said):
    with pytest.raises(UsageError) as caught:
        choose(options)
    assert said in str(caught.value)


def test_system_prompt_from_a_file(tmp_path):
    path = write(tmp_path / "card.txt", "\ufeff你是{character}。\r\n")
    arguments = parser("").parse_args(["x", "--output", "y", "--character", "艾达", "--system", f"@{path}"])
    options = command_of(arguments, lambda model: (str(model), lambda text: [])).options
    assert options.system == "你是{character}。"
    assert options.filled_in().system == "你是艾达。"
