"""The commands, files, settings and links that the READMEs and docs name exist, and CI runs the two commands."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.zh-CN.md")
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
PAGES = (*READMES, "CONTRIBUTING.md", "config/README.md", "data/README.md", *DOCS)
FIRST = "pip install -r requirements.txt && python finetune.py"
FIRST_IN_CHINESE = f"{FIRST} --config config/chinese.json"
SECOND = "pip install -r requirements-dev.txt && python -m pytest"
MADE = ("outputs/", "merged/", "logs", "data/mine/", "llama.cpp/")  # what the commands themselves or the reader make


def blocks(page, language="bash"):
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [body for named, body in fences if named == language]


def commands(page):
    return [line.strip() for block in blocks(page) for line in block.splitlines() if line.strip()]


def script_calls():
    """Every call of a script in the pages, as (page, call)."""
    calls = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        inline = re.findall(r"`(python [\w/]+\.py[^`]*)`", text)
        listed = [line for line in commands(page) if re.match(r"python [\w/]+\.py", line)]
        calls += [(page, call) for call in dict.fromkeys(inline + listed) if "…" not in call and "..." not in call]
    return calls


@cache
def help_of(script):
    command = [sys.executable, str(ROOT / script), "--help"]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout


@pytest.mark.parametrize("page", [*READMES, ".ci/run"])
def test_the_two_commands_stand_there_and_ci_runs_them(page):
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    first = FIRST_IN_CHINESE if page == "README.zh-CN.md" else FIRST
    assert [line for line in lines if line.startswith("pip install -r")] == [first, SECOND]


def test_every_command_is_one_of_a_script_that_knows_its_options():
    calls = script_calls()
    assert len(calls) >= 18
    for page, call in calls:
        script, *words = shlex.split(call.split("   ")[0])[1:]
        assert (ROOT / script).is_file(), f"{page}: {call}"
        for word in words:
            if word.startswith("--"):
                option = re.escape(word.partition("=")[0])
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", help_of(script)), f"{page}: {call}: {word}"


def test_every_file_that_a_command_names_exists():
    count = 0
    for page, call in script_calls():
        for word in shlex.split(call):
            path = word.rpartition("=")[2].removeprefix("@")
            if "/" in path and not path.startswith(MADE) and path.isascii() and path == path.lower():
                count += 1
                assert (ROOT / path).exists(), f"{page}: {call}: {path}"
    assert count >= 10


def test_every_module_that_a_page_names_exists():
    paths = [path.as_posix() for folder in (".", "persona", "tests", "benchmarks")
             for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")]  # fmt: skip
    for page in PAGES:
        for name in re.findall(r"`([\w./-]+\.py)`", (ROOT / page).read_text(encoding="utf-8")):
            assert any(path.endswith(f"/{name}") for path in paths), f"{page}: {name}"


def test_every_setting_that_a_page_names_exists():
    from persona.config import Config, all_settings

    sections = "|".join(Config.model_fields)
    quoted = overridden = 0
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(rf"`((?:{sections})\.\w+)\b", text):
            if not name.endswith((".py", ".json", ".jsonl")):
                quoted += 1
                assert name in all_settings(), f"{page}: {name}"
        for name in re.findall(r"--set ([\w.]+)=", text):
            overridden += 1
            assert name in (*all_settings(), "section.key", "SECTION.KEY"), f"{page}: {name}"
    assert quoted >= 80
    assert overridden >= 8


def test_every_link_to_a_file_leads_somewhere():
    count = 0
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            if "://" not in link:
                count += 1
                assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"
    assert count >= 8


def test_both_languages_have_the_same_commands():
    english, chinese = READMES
    assert [FIRST_IN_CHINESE if line == FIRST else line for line in commands(english)] == commands(chinese)
    assert blocks(english, "") == blocks(chinese, "")


def test_the_table_of_settings_is_the_generated_one():
    from persona.config import settings_table

    text = (ROOT / "config" / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- settings -->")[2].partition("<!-- /settings -->")[0]
    assert table.strip() == settings_table().strip()


def test_every_requirement_is_pinned_and_says_why():
    files = ("requirements.txt", "requirements-dev.txt")
    lines = [line for name in files for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    pins = [line for line in lines if line and not line.startswith(("#", "-r "))]
    assert len(pins) >= 20
    assert [line for line in pins if not re.fullmatch(r"[\w-]+==[\w.]+ +# \S.*", line)] == []


def test_every_stop_of_the_tour_is_in_the_code():
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    stops = re.findall(r"`(persona/[\w/]+\.py)(?:: (\w+))?`", text)
    assert len(stops) >= 30
    for file, name in stops:
        code = (ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^(?:def|class) {name}\b", code, re.MULTILINE), f"{file}: {name}"
