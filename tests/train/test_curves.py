"""Reading a run's history, smoothing it, drawing it, and the script that does so."""

import json
import math
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from persona.errors import DataError, UsageError
from persona.train import curves
from persona.train.curves import DARK, LIGHT, draw, drawable, picture
from persona.train.history import History, read_history, smooth, told_apart

ROOT = Path(__file__).parents[2]

METRICS = [
    {"step": 0, "epoch": 0.0, "eval/loss": 3.0, "eval/perplexity": 20.1},
    {"step": 1, "epoch": 0.5, "train/loss": 2.5, "train/learning_rate": 1e-4, "train/grad_norm": 0.8},
    {"step": 2, "epoch": 1.0, "train/loss": 2.0, "train/learning_rate": 5e-5, "train/grad_norm": 0.7},
    {"step": 2, "epoch": 1.0, "eval/loss": 2.25, "eval/perplexity": 9.5},
    {"step": 3, "epoch": 1.5, "train/loss": 1.5, "train/learning_rate": 0, "train/grad_norm": 0.7},
    {"step": 3, "epoch": 1.5, "eval/loss": 2.75, "eval/perplexity": 15.6},
]
TRAINER_STATE = {
    "best_model_checkpoint": "out/checkpoint-2",
    "global_step": 3,
    "log_history": [
        {"loss": 2.5, "learning_rate": 1e-4, "grad_norm": 0.8, "epoch": 0.5, "step": 1},
        {"loss": 2.0, "learning_rate": 5e-5, "grad_norm": 0.7, "epoch": 1.0, "step": 2},
        {"eval_loss": 2.25, "eval_runtime": 1.0, "epoch": 1.0, "step": 2},
        {"train_loss": 99.0, "train_runtime": 3.0, "total_flos": 1.0, "epoch": 1.0, "step": 2},
    ],
}


def lines(entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


@pytest.fixture
def run_folder(tmp_path):
    def make(text, name="my run", file="metrics.jsonl"):
        folder = tmp_path / "outputs" / name
        folder.mkdir(parents=True)
        (folder / file).write_text(text, encoding="utf-8")
        return folder

    return make


@pytest.fixture
def no_cjk_font(monkeypatch):
    def forget():
        curves._families.cache_clear()
        curves.has_glyph.cache_clear()

    monkeypatch.setattr(curves, "_CJK_FONTS", ())
    forget()
    yield
    forget()


def history(train=(), evaluations=(), learning_rate=(), name="run"):
    return History(name, list(train), list(evaluations), list(learning_rate))


def png_size(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


def plot_loss(*arguments, cwd):
    command = [sys.executable, str(ROOT / "plot_loss.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=60)


# Reading


def test_metrics_of_a_run_folder(run_folder):
    folder = run_folder(lines(METRICS))
    expected = History(
        "my run",
        train=[(1, 2.5), (2, 2.0), (3, 1.5)],
        evaluations=[(0, 3.0), (2, 2.25), (3, 2.75)],
        learning_rate=[(1, 1e-4), (2, 5e-5), (3, 0.0)],
    )
    assert read_history(folder) == read_history(folder / "metrics.jsonl") == expected


def test_trainer_state_without_its_summary(run_folder):
    folder = run_folder(json.dumps(TRAINER_STATE), file="trainer_state.json")
    read = read_history(folder)
    assert read.train == [(1, 2.5), (2, 2.0)]
    assert read.evaluations == [(2, 2.25)]
    assert read.learning_rate == [(1, 1e-4), (2, 5e-5)]


def test_names(run_folder):
    folder = run_folder(json.dumps(TRAINER_STATE), name="hf/checkpoint-3", file="trainer_state.json")
    (folder / "copy of it.json").write_text(json.dumps(TRAINER_STATE), encoding="utf-8")
    assert read_history(folder).name == "hf/checkpoint-3"
    assert read_history(folder / "copy of it.json").name == "copy of it"
    names = [h.name for h in told_apart([history(name=name) for name in ("a", "b", "a", "a")])]
    assert names == ["a", "b", "a (2)", "a (3)"]


@pytest.mark.parametrize("cut", range(1, len(json.dumps(METRICS[-1]))))
def test_torn_last_line_is_left_out(run_folder, cut):
    torn = json.dumps(METRICS[-1])[:cut]
    assert read_history(run_folder(lines(METRICS[:-1]) + torn)).evaluations == [(0, 3.0), (2, 2.25)]


def test_last_line_without_newline_counts(run_folder):
    assert read_history(run_folder(lines(METRICS).rstrip("\n"))).evaluations[-1] == (3, 2.75)


def test_repeated_steps_of_a_resumed_run(run_folder):
    again = [{"step": 2, "train/loss": 1.9}, {"step": 1, "train/loss": 2.4}]
    assert read_history(run_folder(lines(METRICS + again))).train == [(1, 2.4), (2, 1.9), (3, 1.5)]


def test_nan_and_null_are_gaps(run_folder):
    text = '{"step": 1, "train/loss": NaN}\n{"step": 2, "train/loss": null}\n{"step": 3, "train/loss": 1}\n'
    read = read_history(run_folder(text + '{"step": 3, "eval/loss": Infinity}\n'))
    assert [math.isfinite(loss) for _, loss in read.train] == [False, False, True]
    assert read.gaps == 3
    assert read.best is None


@pytest.mark.parametrize(
    ("text", "file", "complaint"),
    [
        (lines(METRICS[:2]) + "{oops\n" + lines(METRICS[2:]), "metrics.jsonl", r"metrics\.jsonl:3: .*'\{oops'"),
        (lines(METRICS) + "{oops\n", "metrics.jsonl", r"metrics\.jsonl:7: "),
        ("Hello.", "metrics.jsonl", r"metrics\.jsonl:1: .*Hello"),
        ("[1, 2]\n", "metrics.jsonl", r"metrics\.jsonl:1: .*object"),
        ("", "metrics.jsonl", "no losses in it, found 0 entries"),
        ('{"step": 1, "tr', "metrics.jsonl", "no losses in it"),
        ('{"step": 1, "speed": 2}\n', "metrics.jsonl", "found 1 entries"),
        ('{"step": "1", "train/loss": 2}\n', "metrics.jsonl", r"metrics\.jsonl:1: \"step\".*'1'"),
        ('{"train/loss": 2}\n', "metrics.jsonl", r"metrics\.jsonl:1: \"step\".*None"),
        ('{"step": 1, "train/loss": "2.0"}\n', "metrics.jsonl", r"metrics\.jsonl:1: \"train/loss\".*'2\.0'"),
        ("\x00\x01PK", "trainer_state.json", "not JSON"),
        ('{"log_history": [', "trainer_state.json", "not JSON"),
        ("[]", "trainer_state.json", "found a list"),
        ('{"train_loss": 1.0}', "trainer_state.json", "found the keys train_loss"),
        ('{"log_history": [1]}', "trainer_state.json", "no list of objects"),
        ('{"log_history": []}', "trainer_state.json", "no losses in it"),
        ('{"log_history": [{"loss": 1}]}', "trainer_state.json", r"log_history\[0\]: \"step\""),
    ],
)
def test_wrong_histories(run_folder, text, file, complaint):
    with pytest.raises(DataError, match=complaint) as caught:
        read_history(run_folder(text, file=file))
    assert file in str(caught.value)


def test_a_picture_is_not_a_history(tmp_path):
    picture = tmp_path / "loss.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(DataError, match=r"loss\.png: not JSON.*metrics\.jsonl"):
        read_history(picture)


def test_wrong_places(tmp_path, run_folder):
    with pytest.raises(UsageError, match=r"nowhere: there is no such file or folder.*outputs/my_run"):
        read_history(tmp_path / "nowhere")
    folder = run_folder(lines(METRICS))
    with pytest.raises(UsageError, match=r"found my run/\. Did you mean .*my run\?"):
        read_history(folder.parent)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UsageError, match=r"neither metrics\.jsonl nor trainer_state\.json .*found nothing"):
        read_history(folder)


# Numbers


def test_smoothing_by_hand():
    # averages 2, 2, 4 with weights 1/2, 3/4, 7/8
    assert smooth([4, 2, 6], 0.5) == pytest.approx([4, 8 / 3, 32 / 7])
    assert smooth([4, 2, 6], 0) == [4, 2, 6]
    assert smooth([3.0] * 50, 0.99) == pytest.approx([3.0] * 50)
    assert smooth([], 0.9) == []


def test_smoothing_steps_over_gaps():
    smoothed = smooth([math.nan, 4, math.inf, 2], 0.5)
    assert [smoothed[1], smoothed[3]] == pytest.approx([4, 8 / 3])
    assert math.isnan(smoothed[0])
    assert math.isnan(smoothed[2])


@pytest.mark.parametrize("factor", [1, 1.5, -0.1, math.nan])
def test_smoothing_out_of_bounds(factor):
    with pytest.raises(UsageError, match="from 0"):
        smooth([1.0], factor)


def test_best_evaluation():
    assert history(evaluations=[(0, 3.0), (2, math.nan), (4, 2.0), (6, 2.0), (8, 2.5)]).best == (4, 2.0)
    assert history(train=[(1, 1.0)]).best is None
    assert history(train=[(1, 1.0), (7, 1.0)], evaluations=[(5, 2.0)]).updates == 7


# Drawing

FULL = history([(s, 3 - s / 50) for s in range(1, 101)], [(0, 3.1), (50, 2.2), (100, 2.4)], [(1, 0.0), (100, 1e-4)])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "histories",
    [
        [FULL],
        [history([(1, 2.0)])],
        [history([(1, 2.0)], [(1, 2.0)], [(1, 0.0)])],
        [history([], [(0, 2.0)])],
        [history([(1, math.nan)], [(1, math.nan)], [(1, math.nan)])],
        [history([(1, 3.0), (2, math.nan), (3, math.inf), (4, 2.0)], name="_$x_1$ \n\x1b[31m 🎭")],
        [FULL, history([(1, 2.0)], name="_"), history([], [(5, math.nan)], name="$")],
        [FULL] * 9,
    ],
)
@pytest.mark.parametrize("smoothing", [0, 0.9])
def test_draws_without_warnings(tmp_path, histories, smoothing):
    path = tmp_path / "not yet" / "there" / "loss.png"
    assert draw(histories, path, smoothing) == path
    assert png_size(path) == (1500, 900)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("run", [FULL, history([(1, 2.0)]), history([], [(0, 2.0)]), history([], [(0, 1.0), (9, 900)])])
def test_a_picture_for_a_page_is_drawn_without_warnings(tmp_path, theme, run):
    (tmp_path / "page.png").write_bytes(picture(run, 0.9, theme))
    assert png_size(tmp_path / "page.png") == (840, 504)


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("no_cjk_font")
def test_chinese_names_without_a_chinese_font(tmp_path):
    assert drawable("晴雯 é v2") == "\\u6674\\u96ef é v2"
    png_size(draw([history([(1, 2.0)], name="晴雯")], tmp_path / "loss.png", 0.9))


def test_long_names_are_cut():
    assert len(drawable("x" * 300)) == 60


def test_wrong_save_paths(tmp_path):
    with pytest.raises(UsageError, match=r"ends in \.png"):
        draw([FULL], tmp_path / "loss", 0.9)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"cannot be written.*--save_path"):
        draw([FULL], tmp_path / "file" / "loss.png", 0.9)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        draw([FULL], tmp_path / "folder.png", 0.9)


# The script


def test_script_draws_one_run(run_folder, tmp_path):
    folder = run_folder(lines(METRICS), name="晴雯 第二次")
    done = plot_loss(folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.startswith("晴雯 第二次\n")
    for row in ("updates          3\n", "last train loss  1.5000\n", "best evaluation  2.2500 at step 2\n"):
        assert row in done.stdout
    assert done.stdout.endswith(f"written to {folder / 'loss.png'}\n")
    png_size(folder / "loss.png")


def test_script_compares_runs(run_folder, tmp_path):
    first = run_folder(lines(METRICS), name="first")
    second = run_folder('{"step": 1, "train/loss": NaN}\n{"step": 2, "train/loss": 1}\n', name="第二")
    done = plot_loss(first, "--json_file", second / "metrics.jsonl", "--json_file", first, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("updates") == 2  # the same run given twice is one run
    assert "gaps             1, where a loss is NaN or infinite\n" in done.stdout
    assert "best evaluation  none" in done.stdout
    png_size(tmp_path / "loss_comparison.png")


def test_script_takes_a_save_path(run_folder, tmp_path):
    folder = run_folder(lines(METRICS))
    done = plot_loss("--json_file", folder, "--save_path", "图 片/曲线.png", "--smoothing", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    png_size(tmp_path / "图 片" / "曲线.png")
    assert not (folder / "loss.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ([], 2, "Give a run's folder"),
        (["missing"], 2, "missing: there is no such file or folder"),
        (["empty"], 2, "found nothing"),
        (["broken.json"], 3, "broken.json: not JSON"),
        (["good.jsonl", "--smoothing", "1"], 2, "smoothing must be"),
        (["good.jsonl", "--smoothing", "much"], 2, "invalid float"),
        (["good.jsonl", "--save_path", "loss.docx"], 2, "loss.docx: give a picture's file name"),
    ],
)
def test_script_refuses(tmp_path, arguments, code, complaint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("step 1", encoding="utf-8")
    (tmp_path / "good.jsonl").write_text(lines(METRICS), encoding="utf-8")
    done = plot_loss(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_quick(tmp_path):
    start = time.perf_counter()
    done = plot_loss("--help", cwd=tmp_path)
    assert time.perf_counter() - start < 0.5 * 4  # measured 0.06 s; a machine that runs other tests is slower
    assert "--smoothing" in done.stdout
    probe = "import sys, plot_loss; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, timeout=60).returncode == 0
