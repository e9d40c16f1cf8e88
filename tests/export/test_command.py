"""What lies beside a merged model and what is written for other programs, by the script and on the tiny model."""

import json
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from making import toy_converter
from making.runs import QUESTIONS, REPLIES, config
from safetensors.numpy import load_file

import merge_lora_to_fp16
from persona.config import Generation
from persona.errors import DataError, UsageError
from persona.export import gguf
from persona.export.command import character_card
from persona.export.llama_cpp import ADAPTER_SCRIPT, MODEL_SCRIPT
from persona.merge.folder import sampling, without_paths
from persona.train.run import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    """A finished run on the tiny model."""
    folder = tmp_path_factory.mktemp("a run")
    chosen = config(folder, tiny_model, generation={"temperature": 0.6, "top_p": 0.8, "repetition_penalty": 1.2})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finetune(chosen, True, lambda line: None)
    AcceleratorState._reset_state()
    return Path(chosen.training.output_dir)


@pytest.fixture
def merge(run, tmp_path, monkeypatch, capsys):
    """Run the script on the run, in a folder of its own, with the toy converter; returns what it prints."""

    def convert(script, arguments):
        source, options = Path(arguments[0]), dict(zip(arguments[1::2], arguments[2::2], strict=True))
        if script.name == MODEL_SCRIPT:
            name, kind = options["--model-name"], options["--outtype"]
            toy_converter.convert_model(source, options["--outfile"], kind, name, called.fault)
        else:
            toy_converter.convert_adapter(source, options["--base"], options["--outfile"])

    monkeypatch.setattr(gguf, "run_converter", convert)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama.cpp").mkdir()
    for name in (MODEL_SCRIPT, ADAPTER_SCRIPT):
        (tmp_path / "llama.cpp" / name).write_text('"LlamaForCausalLM"', encoding="utf-8")

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["merge_lora_to_fp16.py", str(run), *map(str, arguments)])
        merge_lora_to_fp16.main()
        return capsys.readouterr().out

    called.fault = ""
    return called


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_the_merged_folder_says_how_it_speaks_and_where_it_comes_from(merge, run):
    from transformers import GenerationConfig

    merge("--output", "out")
    loaded = GenerationConfig.from_pretrained("out")
    loaded.validate(strict=True)
    assert (loaded.do_sample, loaded.temperature, loaded.top_p, loaded.repetition_penalty) == (True, 0.6, 0.8, 1.2)
    assert isinstance(loaded.eos_token_id, list)
    card = Path("out/README.md").read_text(encoding="utf-8")
    for part in ("library_name: transformers", "12 conversations", "3 held out", "held-out loss", "licence", "machine"):
        assert part in card
    record = read("out/run.json")
    assert record["trained"]["summary"] == read(run / "run.json")["summary"]
    assert {
        "file": "train.jsonl",
        "sha256": read(run / "run.json")["data_sha256"][str(run.parents[1] / "train.jsonl")],
    } in (record["trained"]["data_sha256"])
    for name in ("README.md", "run.json", "persona.json"):
        text = Path("out", name).read_text(encoding="utf-8")
        assert str(run.parents[1]) not in text
        assert not any(line in text for line in (*QUESTIONS, *REPLIES))


def test_merging_again_over_an_earlier_merge_is_allowed(merge):
    merge("--output", "out")
    assert "Written to out" in merge("--output", "out")


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_the_sampling_is_what_transformers_accepts(temperature):
    from transformers import GenerationConfig

    values = sampling(Generation(temperature=temperature))
    made = GenerationConfig(**values)
    made.validate(strict=True)
    assert made.do_sample == (temperature > 0)
    assert values.get("top_k") == (0 if temperature else None)


def test_paths_of_the_machine_are_shortened_and_names_kept():
    record = {
        "date": "2024-05-01",
        "system_prompt": "You.",
        "settings": {
            "data": {
                "train_file": "/home/li/秘密/train.jsonl",
                "validation_file": None,
                "system_prompt": "@C:\\li\\card.txt",
            },
            "model": {"name_or_path": "Qwen/Qwen3-4B", "chat_template": "../t.jinja"},
        },
        "data_sha256": {"data/a/train.jsonl": "12", "data/b/train.jsonl": "34"},
    }
    plain = without_paths(record)
    assert plain["settings"]["data"] == {
        "train_file": "train.jsonl",
        "validation_file": None,
        "system_prompt": "@card.txt",
    }
    assert plain["settings"]["model"] == {"name_or_path": "Qwen/Qwen3-4B", "chat_template": "t.jinja"}
    assert [entry["sha256"] for entry in plain["data_sha256"]] == ["12", "34"]
    assert without_paths({}) == {}


def test_gguf_adapter_modelfiles_and_card_are_written_together(merge):
    said = merge(
        *("--output", "out", "--gguf", "守灯人.gguf", "--outtype", "q8_0", "--gguf-adapter", "sub/lora.gguf"),
        *("--llama-cpp", "llama.cpp", "--character-card", "card.json", "--character", "Keeper", "--greeting", "Aye?"),
    )
    count = len(load_file("out/model.safetensors"))
    assert f"(llama, Q8_0): all {count} tensors, vocabulary, end tokens and chat template are those of out;" in said
    assert "sub/lora.gguf: the adapter without its base, all 28 matrices compared" in said
    assert said.count("ollama create") == 2
    whole = Path("守灯人.Modelfile").read_text(encoding="utf-8")
    alone = Path("sub/lora.Modelfile").read_text(encoding="utf-8")
    assert "\nFROM ./守灯人.gguf\n" in whole
    assert "\nADAPTER ./lora.gguf\n" in alone
    for text in (whole, alone):
        assert 'SYSTEM """You keep the lamp."""' in text
        assert "PARAMETER temperature 0.6" in text
        assert 'PARAMETER stop "<|im_end|>"' in text
        assert "{{- range $i, $_ := .Messages }}" in text
    data = read("card.json")["data"]
    assert (data["name"], data["system_prompt"], data["first_mes"]) == ("Keeper", "You keep the lamp.", "Aye?")
    assert data["mes_example"] == ""
    assert Path("守灯人.gguf").stat().st_size > 1000
    assert "--lora sub/lora.gguf --chat-template-file sub/lora.jinja --jinja" in said
    template = Path("sub/lora.jinja").read_text(encoding="utf-8")
    assert template == Path("out/chat_template.jinja").read_text(encoding="utf-8").join(
        ["{#- Written by merge_lora_to_fp16.py as the chat template of lora.gguf #}\n", ""]
    )
    merge("--gguf-adapter", "sub/lora.gguf", "--llama-cpp", "llama.cpp")  # its own files are replaced


@pytest.mark.parametrize(
    ("fault", "says"),
    [("values", "has other values"), ("missing", "is missing"), ("extra", "is not part of the model")],
)
def test_a_gguf_file_of_which_a_tensor_differs_is_not_written(merge, fault, says):
    merge.fault = fault
    with pytest.raises(DataError, match=says):
        merge("--output", "out", "--gguf", "a.gguf", "--llama-cpp", "llama.cpp")
    assert not [path for path in Path().iterdir() if path.name not in ("out", "llama.cpp")]


def test_the_adapter_or_the_card_alone_merges_nothing(merge):
    assert "Merged" not in merge("--gguf-adapter", "a.gguf", "--llama-cpp", "llama.cpp", "--character-card", "c.json")
    assert not Path("merged").exists()
    assert Path("a.gguf").is_file()


def test_training_data_come_into_a_card_only_when_asked_for(merge):
    said = merge("--character-card", "new/c.json", "--examples", 2)
    examples = read("new/c.json")["data"]["mes_example"]
    assert examples.count("<START>\n{{user}}: ") == 2
    assert "{{char}}: Aye, I keep the lamp." in examples
    assert "who has it can read them" in said


def test_a_card_has_every_field_of_the_specification():
    card = character_card("Tamsin", None, "", [], "tamsin")
    assert (card["spec"], card["spec_version"]) == ("chara_card_v2", "2.0")
    texts = "name description personality scenario first_mes mes_example creator_notes system_prompt"
    texts += " post_history_instructions creator character_version"
    assert all(isinstance(card["data"][key], str) for key in texts.split())
    assert card["data"]["alternate_greetings"] == []
    assert card["data"]["extensions"] == {}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gguf", "a.gguf"], "need --llama-cpp"),
        (["--gguf", "a.gguf", "--llama-cpp", "nowhere"], "git clone"),
        (["--gguf", "a.gguf", "--gguf-adapter", "a.gguf", "--llama-cpp", "llama.cpp"], "the same file"),
        (["--gguf", "out/a.gguf", "--output", "out", "--llama-cpp", "llama.cpp"], "is inside out"),
        (["--gguf", "mine.gguf", "--llama-cpp", "llama.cpp"], "mine.Modelfile exists and was not written by this"),
        (["--character-card", "card.txt"], "NAME.json"),
        (["--character-card", "mine.Modelfile/c.json"], "--character-card mine.Modelfile cannot be a folder"),
        (["--character-card", f"{'x' * 250}.json"], "too long"),
        (["--gguf-adapter", "mine.Modelfile/a.gguf", "--llama-cpp", "llama.cpp"], "--gguf-adapter mine.Modelfile"),
        (["--output", "mine.Modelfile/out"], "since .*mine.Modelfile is a file"),
        (["--output", "x" * 300], "too long"),
        (["--output", "out", "--examples", 3], "--examples does nothing without --character-card"),
        (["--output", "out", "--character", "X"], "--character does nothing without --character-card"),
        (["--output", "out", "--greeting", "Aye"], "--greeting does nothing without --character-card"),
        (["--output", "out", "--outtype", "q8_0"], "--outtype does nothing without --gguf"),
        (["--output", "out", "--llama-cpp", "llama.cpp"], "--llama-cpp does nothing without --gguf or --gguf-adapter"),
        (["--character-card", "c.json", "--no-verify"], "--no-verify does nothing without --output or --gguf"),
        (["--character-card", "c.json", "--output", "out", "--greeting", "@gone.txt"], "gone.txt cannot be read"),
        (["--character-card", "c.json", "--examples", 1, "--set", "data.train_file=gone.jsonl"], "is not there"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is(merge, tmp_path, arguments, says):
    Path("mine.Modelfile").write_text("FROM llama3", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=says):
        merge(*arguments)
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("mine.Modelfile").read_text(encoding="utf-8") == "FROM llama3"
