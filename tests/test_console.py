"""What reaches the terminal: text of others cannot steer it, columns line up, and every end has its exit code."""

import errno
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona.console import (
    GREEN,
    GREY,
    colour_wanted,
    display_width,
    duration,
    excerpt,
    painted,
    run_script,
    safe,
    table,
)
from persona.errors import DataError, Diverged, EnvironmentFault, Interrupted, OutOfMemory, PersonaError, UsageError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\nof two lines", "plain\ttext\nof two lines"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\rb", "a\\x0db"),
        ("\x00\x08\x7f", "\\x00\\x08\\x7f"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),
        ("\u202eevil\u2066\u2069", "\\u202eevil\\u2066\\u2069"),
        ("你好 🌊 é\u0301 “—”", "你好 🌊 é\u0301 “—”"),
        ("\\x1b", "\\x1b"),
    ],
)
def test_text_of_others_is_made_visible(text, shown):
    assert safe(text) == shown


@given(st.text())
def test_nothing_that_steers_is_left(text):
    left = safe(text)
    assert not any(ord(c) < 32 and c not in "\t\n" or 127 <= ord(c) < 160 for c in left)
    assert not any("\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069" for c in left)
    assert safe(left) == left


@given(st.text(), st.integers(1, 90))
def test_an_excerpt_is_one_short_line(text, width):
    line = excerpt(text, width)
    assert len(line) <= width
    assert "\n" not in line
    assert "\x1b" not in line


def test_an_excerpt_says_that_it_is_cut():
    assert excerpt("one\n  two\tthree") == "one two three"
    assert excerpt("a" * 80) == "a" * 80
    assert excerpt("a" * 81) == "a" * 79 + "…"


def test_wide_characters_take_two_columns():
    assert [display_width(text) for text in ("", "abc", "莫言秋", "（全）", "é", "e\u0301")] == [0, 3, 6, 6, 1, 1]


def test_a_table_lines_up():
    text = table([("name", "1"), ("莫言秋", "2"), ("", "3")])
    assert text == "  name    1\n  莫言秋  2\n          3"
    assert len({display_width(line) for line in text.splitlines()}) == 1
    assert table([]) == ""
    assert table(iter([("a", "b")])) == "  a  b"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (425, "7 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_duration(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("terminal", "variables", "wanted"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {"TERM": "xterm"}, True),
    ],
)
def test_when_colours_are_wanted(monkeypatch, terminal, variables, wanted):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert colour_wanted() is wanted


@pytest.mark.parametrize(("colour", "number"), [(GREEN, 32), (GREY, 90)])
def test_colours_only_when_wanted(colour, number):
    assert painted("x", colour, False) == "x"
    assert painted("x", colour, True) == f"\x1b[{number}mx\x1b[0m"


# --- how a script ends -----------------------------------------------------------------------------------------------


def raising(error):
    def main():
        raise error

    return main


def exit_code(main):
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PersonaError("what and why"), 1),
        (UsageError("what and why"), 2),
        (DataError("what and why"), 3),
        (EnvironmentFault("what and why"), 4),
        (OutOfMemory("what and why"), 5),
        (Diverged("what and why"), 6),
        (Interrupted("what and why", 2), 130),
        (Interrupted("what and why", 15), 143),
    ],
)
def test_a_fault_prints_its_message_and_exits_with_its_code(capsys, error, code):
    assert exit_code(raising(error)) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", "what and why\n")


def test_ctrl_c_exits_with_130(capsys):
    assert exit_code(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\nStopped.\n"


def test_a_library_that_is_missing_is_named(capsys):
    def main():
        import transformers_of_nobody.models  # noqa: F401  # pyright: ignore[reportMissingImports]

    assert exit_code(main) == 4
    said = capsys.readouterr().err
    assert "transformers_of_nobody is not installed" in said
    assert "pip install -r requirements.txt" in said


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENAMETOOLONG, 2), (errno.ENOTDIR, 2), (errno.EEXIST, 2), (errno.EACCES, 4), (errno.ENOSPC, 4)],
)
def test_a_path_that_the_system_refuses_is_named(capsys, number, code):
    assert exit_code(raising(OSError(number, "refused", "a\x1b/b" * 60))) == code
    place, _, rest = capsys.readouterr().err.partition(": ")
    assert place.startswith("a\\x1b/b")
    assert len(place) == 80
    assert re.match(r"refused\. C(hoose|heck) ", rest)
    assert exit_code(raising(OSError(number, "refused"))) == code
    assert capsys.readouterr().err.startswith("refused. ")


@pytest.mark.parametrize("name", ["persona.gone", "torch.gone", None])
def test_a_part_that_is_missing_of_what_is_there_is_a_bug(name):
    with pytest.raises(ModuleNotFoundError):
        run_script(raising(ModuleNotFoundError("gone", name=name)))


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_code_that_main_returns(returned, code):
    assert exit_code(lambda: returned) == code


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)
    with pytest.raises(FileNotFoundError):  # whoever names a file that may be missing says so
        run_script(lambda: Path("gone").read_bytes())


def python(code, **options):
    return subprocess.Popen(
        [sys.executable, "-c", f"from persona.console import run_script\n{code}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.mark.parametrize("count", [1, 100_000])
def test_a_reader_that_goes_away_is_no_fault(count):
    # `python script.py | head`, with output that fits into the buffer and with output that does not
    process = python(
        f"import sys, time\ndef main():\n    sys.stdin.read()\n    print('line\\n' * {count})\nrun_script(main)",
        stdin=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_any_text_can_be_printed_whatever_the_code_page():
    process = python(
        "run_script(lambda: print('莫言秋 🌊 \\ud83d'))",
        env={"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "PATH": ""},
    )
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, b"")
    assert out.decode("utf-8").rstrip() == "莫言秋 🌊 ?"


def test_console_is_imported_at_once():
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import persona.console"], cwd=ROOT, check=True)
    assert time.perf_counter() - begun < 2


def test_columns_are_aligned_by_what_a_terminal_shows():
    from persona.console import columns

    lines = columns([("", "base", "tuned"), ("灯塔", "1.50", "2"), ("a longer name", "10.25", "")]).split("\n")
    assert lines == [
        "                  base  tuned",
        "  灯塔            1.50      2",
        "  a longer name  10.25",
    ]


def test_progress_says_the_time_left_and_ends_with_a_line(capsys):
    from persona.console import progress

    show = progress("replies")
    show(0, 4, None)
    show(2, 4, 65.0)  # too soon after the first to be worth a line where there is no terminal
    show(4, 4, 0.0)
    assert capsys.readouterr().err == "  replies: 0 of 4\n  replies: 4 of 4\n"


def test_progress_writes_in_place_on_a_terminal(capsys, monkeypatch):
    from persona.console import progress

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("time.monotonic", iter([10.0, 20.0, 30.0]).__next__)
    show = progress("replies")
    for done, left in ((0, None), (2, 65.0), (4, 0.0)):
        show(done, 4, left)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "2 of 4, about 1 min 05 s left" in said
