"""Several processes train what one trains, end together whatever happens to one of them, and continue exactly."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from making.runs import adapter_bytes, metrics, settings
from safetensors.torch import load_file

from persona.config import Config
from persona.engine.packing import portion
from persona.errors import UsageError
from persona.files import MARKER
from persona.model.render import Example
from persona.train.devices import joined
from persona.train.run import finetune

ROOT = Path(__file__).parents[2]
FINETUNE = (str(ROOT / "finetune.py"), "--config", "run.json", "--set")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
ACCELERATE = ("accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
              "--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no")  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state()


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"} | more


def launched(launcher, *script):
    """A launcher with two processes of `script`, from its start to its end."""
    command = [sys.executable, "-m", *launcher, *script]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment(), timeout=200)


class Pair:
    """Two processes of `script`, started as a launcher starts them but without one that would end the second."""

    def __init__(self, *script, **more):
        ask = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"
        port = subprocess.run([sys.executable, "-c", ask], capture_output=True, check=True).stdout.decode().strip()
        self.processes = []
        for rank in ("0", "1"):
            variables = environment(
                RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **more
            )
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *script],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                    env=variables,
                )
            )

    def ended(self):
        """Exit codes, and what each process wrote to standard output and to standard error."""
        texts = [process.communicate(timeout=100) for process in self.processes]
        return [process.returncode for process in self.processes], [out for out, _ in texts], [err for _, err in texts]


def write_settings(tmp_path, model, **changes):
    values = settings(tmp_path, model, train=13, held_out=5, **changes)
    values["evaluation"]["early_stopping_patience"] = None
    (tmp_path / "run.json").write_text(json.dumps(values), encoding="utf-8")
    return Config.model_validate(values)


# 13 conversations in updates of 4: the last of each epoch is one of a single reply, so that one process has no pack
TWENTY_FOUR = {"num_train_epochs": 6, "max_tokens_per_pack": 100}


def test_two_processes_learn_what_one_learns(tmp_path, tiny_model):
    made = write_settings(tmp_path, tiny_model, lora={"lora_dropout": 0}, training=TWENTY_FOUR)
    whole = finetune(made, True, lambda _: None).parent
    speaking = ("--set", "evaluation.sample_prompts=2")
    done = launched(ACCELERATE, *FINETUNE, "training.output_dir=outputs/two", *speaking)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("update   24/24") == done.stdout.count("Done.") == 1
    assert "2 of cpu in fp32" in done.stdout
    two = tmp_path / "outputs" / "two"
    assert (two / "loss.png").is_file()
    assert len((two / "samples.jsonl").read_text(encoding="utf-8").splitlines()) == 2 * 13
    assert sum("train/loss" in line for line in metrics(two)) == 24
    assert_same_learning(two, whole)


def assert_same_learning(one, other):
    ours, theirs = metrics(one), metrics(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for tag in ("train/loss", "eval/loss"):
        assert [line.get(tag, 0) for line in ours] == pytest.approx([line.get(tag, 0) for line in theirs], abs=1e-5)
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert max((weights[0][name] - weights[1][name]).abs().max() for name in weights[0]) < 1e-4


# Runs of these settings in the folders named last, in 4 bits where the name says so. In those whose name begins with
# cut, something happens to the second process after an update: a signal, or its memory is full in the next one.
HIT = """
import os
import signal
import sys
from pathlib import Path

from persona.console import run_script
from persona.train.devices import joined

name, step, *folders = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it starts in the background


def main():
    with joined() as devices:
        from persona.config import load_config
        from persona.train.run import finetune

        def observe(trainer, update):
            if devices.rank == 1 and trainer.run.name.startswith("cut") and trainer.progress.step == int(step):
                if name == "memory":
                    trainer.model.register_forward_pre_hook(full)
                else:
                    os.kill(os.getpid(), getattr(signal, name))

        for folder in folders:
            bits = ["quantization.load_in_4bit=true"] if "4bit" in folder else []
            made = load_config(Path("run.json"), [f"training.output_dir={folder}", *bits])
            finetune(made, True, print, devices, [observe])


def full(model, inputs):
    raise MemoryError("no memory left")


run_script(main)
"""


def test_stopped_and_killed_and_continued_is_the_same_run(tmp_path, tiny_model):
    training = {"num_train_epochs": 6, "save_steps": 4}
    write_settings(tmp_path, tiny_model, training=training)
    (tmp_path / "hit.py").write_text(HIT, encoding="utf-8")
    run = tmp_path / "outputs" / "cut"
    codes, said, faults = Pair("hit.py", "SIGINT", "6", "outputs/whole", "outputs/cut").ended()
    assert codes == [130, 130], faults
    assert "update   24/24" in said[0]  # the first run
    assert said[1] == ""
    assert faults[0].strip().startswith("Stopped after update 6 of 24; the state is saved.")
    assert faults[1] == ""

    codes, said, faults = Pair("hit.py", "SIGKILL", "14", "outputs/cut").ended()
    assert codes == [4, -signal.SIGKILL], faults
    assert "Continuing after update 6 " in said[0]
    assert "Another process of this run has ended" in faults[0]
    assert "Traceback" not in faults[0]

    done = launched(TORCHRUN, *FINETUNE, "training.output_dir=outputs/cut")
    assert done.returncode == 0, done.stderr
    assert "Continuing after update 12 " in done.stdout
    assert adapter_bytes(run) == adapter_bytes(tmp_path / "outputs" / "whole")

    # another number of processes goes on, and says what differs
    (run / "checkpoint-24" / MARKER).unlink()
    (run / "adapter").rename(run / "adapter-of-two")
    said = []
    made = write_settings(tmp_path, tiny_model, training=training | {"output_dir": "outputs/cut"})
    finetune(made, True, said.append)
    assert "Until there 2 processes trained, now 1: dropout draws other random numbers" in "\n".join(said)


# As `accelerate config` writes it
FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2}
num_machines: 1
num_processes: 2
main_process_port: 0
mixed_precision: 'no'
"""


def test_a_base_that_is_shared_out_learns_the_same_in_16_and_in_4_bits(tmp_path, tiny_model):
    training = {"num_train_epochs": 2, "max_tokens_per_pack": 100, "gradient_checkpointing": True, "save_steps": 4}
    changes = {"lora": {"lora_dropout": 0}, "training": training, "evaluation": {"eval_steps": 4}}
    made = write_settings(tmp_path, tiny_model, **changes)
    whole = finetune(made, True, lambda _: None).parent
    four = {"quantization": {"load_in_4bit": True}, "training": training | {"output_dir": "outputs/four"}}
    whole_4bit = finetune(write_settings(tmp_path, tiny_model, **(changes | four)), True, lambda _: None).parent
    write_settings(tmp_path, tiny_model, **changes)
    (tmp_path / "hit.py").write_text(HIT, encoding="utf-8")
    folders = ("outputs/shared", "outputs/cut-4bit")
    codes, said, faults = Pair("hit.py", "memory", "5", *folders, ACCELERATE_USE_FSDP="true").ended()
    assert codes == [4, 5], faults
    assert "2 of cpu sharing out the base in fp32" in said[0]
    assert "Another process of this run has ended" in faults[0]
    assert "no memory left" in faults[1]
    assert "set training.max_tokens_per_pack to 50 (now 100)" in faults[1]
    assert "Traceback" not in "".join(faults)
    assert_same_learning(tmp_path / "outputs" / "shared", whole)

    (tmp_path / "fsdp.yaml").write_text(FSDP, encoding="utf-8")
    launcher = ("accelerate.commands.accelerate_cli", "launch", "--config_file", "fsdp.yaml")
    four_bits = ("--set", "quantization.load_in_4bit=true", "--set", "evaluation.sample_prompts=2")
    done = launched(launcher, *FINETUNE, "training.output_dir=outputs/cut-4bit", *four_bits)
    assert done.returncode == 0, done.stderr
    assert "Continuing after update 4 " in done.stdout
    assert "no samples during training" in done.stdout
    assert_same_learning(tmp_path / "outputs" / "cut-4bit", whole_4bit)


# The memory of the second process, which prints nothing, holds packs of 125 tokens
FULL = """
from pathlib import Path

import torch

import persona.train.loop
from persona.console import run_script
from persona.train.devices import joined

compute = persona.train.loop.negative_log_likelihood


def main():
    with joined() as devices:
        from persona.config import load_config
        from persona.train.run import finetune

        def small(model, packed):
            loss = compute(model, packed)
            if devices.rank == 1 and model.training and packed.input_ids.numel() > 125:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return loss

        persona.train.loop.negative_log_likelihood = small
        persona.train.loop.TRIED_ON = ("cpu",)
        finetune(load_config(Path("run.json"), []), True, print, devices)


run_script(main)
"""


def test_one_process_with_a_full_memory_halves_the_packs_of_all(tmp_path, tiny_model):
    training = {"num_train_epochs": 2, "train_batch_size": 8, "max_tokens_per_pack": 240}
    made = write_settings(tmp_path, tiny_model, lora={"lora_dropout": 0}, training=training)
    whole = finetune(made, True, lambda _: None).parent
    write_settings(tmp_path, tiny_model, lora={"lora_dropout": 0}, training=training | {"output_dir": "outputs/two"})
    (tmp_path / "full.py").write_text(FULL, encoding="utf-8")
    codes, said, faults = Pair("full.py").ended()
    assert codes == [0, 0], faults
    assert "The memory is full (in another process): going on with packs of 120 tokens" in said[0]
    assert said[1] == ""
    two = tmp_path / "outputs" / "two"
    assert json.loads((two / "run.json").read_text(encoding="utf-8"))["fitted"] == {"training.max_tokens_per_pack": 120}
    assert_same_learning(two, whole)


def test_a_mistake_is_said_once_and_all_end_with_its_code(tmp_path, tiny_model):
    write_settings(tmp_path, tiny_model)
    codes, said, faults = Pair(*FINETUNE, "data.train_file=nowhere.jsonl").ended()
    assert codes == [3, 3], faults
    assert "nowhere.jsonl does not exist" in faults[0]
    assert said == ["", ""]
    assert faults[1] == ""


# Each line of the script is one meeting of the two processes; the last fault of each pair is in one of them only.
MEETINGS = """
import sys
import torch
from persona.console import run_script
from persona.train.devices import joined
from persona.errors import Diverged, EnvironmentFault


def main():
    with joined() as devices:
        assert devices.largest(devices.rank + 4) == 5
        assert devices.total(devices.rank + 0.5) == 2.0
        assert devices.gather("ab"[devices.rank]) == ["a", "b"]
        assert devices.on_main(lambda: {"rank": devices.rank}) == {"rank": 0}
        weights = [torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(3))]
        if devices.main:
            weights[0].grad = torch.ones(2, 2)
        weights[1].grad = torch.full((3,), 2.0)
        assert devices.sum_gradients(weights, torch.tensor(0.25)).item() == 0.5
        assert weights[0].grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]
        assert weights[1].grad.tolist() == [4.0, 4.0, 4.0]
        assert devices.first_on_each_machine(lambda: devices.rank) == devices.rank
        how = sys.argv[1]
        if how == "main":
            devices.on_main(full)
        if how == "other" and devices.rank == 1:
            raise Diverged("too far")
        if how == "bug" and devices.rank == 1:
            devices.gather(1 / 0)
        if how == "differs":
            devices.same("bf16" if devices.main else "fp16", "training.precision")
        if how != "nothing":
            devices.total(1.0)


def full():
    raise EnvironmentFault("the disk is full")


run_script(main)
"""
ENDS = {
    "nothing": ([0, 0], ""),
    "main": ([4, 4], "the disk is full\n"),
    "other": ([6, 6], "In process 1 of 2: too far\n"),
    "bug": ([1, 1], "In process 1 of 2: a fault of the program, see above: ZeroDivisionError: division by zero\n"),
    "differs": ([2, 2], "training.precision auto means something else on each device (bf16, fp16); set it.\n"),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_fault_in_one_process_ends_all_of_them(tmp_path, how):
    (tmp_path / "meetings.py").write_text(MEETINGS, encoding="utf-8")
    codes, _, faults = Pair("meetings.py", how).ended()
    assert (codes, faults[0]) == ENDS[how]
    assert ("Traceback" in faults[1]) is (how == "bug")
    assert how == "bug" or faults[1] == ""


# As libraries do that are imported once the processes have met
LATE = """
import weakref

from persona.train.devices import joined

with joined() as devices:
    import torch.distributed.nn

    assert devices.total(devices.rank) == 1
    group = weakref.ref(torch.distributed.distributed_c10d._get_default_group())
print("ended" if group() is None else "there still")
"""


def test_the_threads_of_the_exchange_end_before_python_does(tmp_path):
    """One that drops a tensor while Python ends aborts the process: "terminate called without an active exception"."""
    (tmp_path / "late.py").write_text(LATE, encoding="utf-8")
    codes, said, faults = Pair("late.py").ended()
    assert codes == [0, 0], faults
    assert said == ["ended\n"] * 2


@pytest.mark.parametrize("variable", ["FSDP_OFFLOAD_PARAMS", "ACCELERATE_USE_DEEPSPEED"])
def test_what_is_not_offered_is_refused_with_what_is(monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    offered = r"data parallelism.*launch --multi_gpu.*--use_fsdp.*docs/devices\.md"
    with pytest.raises(UsageError, match=offered), joined():
        raise AssertionError("refused before anything is done")


def test_each_process_gets_as_much_and_every_example_is_somewhere():
    card = tuple(range(100, 400))
    examples = [Example((*card, n % 3, n), tuple(range(n % 7 + 1))) for n in range(50)]
    for count in (1, 2, 3, 7):
        for share in (True, False):
            parts = [portion(examples, rank, count, share) for rank in range(count)]
            assert sorted(e.prompt_ids for part in parts for e in part) == sorted(e.prompt_ids for e in examples)
            loads = [sum(3 + len(e.reply_ids) for e in part) for part in parts]
            assert max(loads) - min(loads) <= 24
    few = [portion(examples[:2], rank, 4, True) for rank in range(4)]
    assert sorted(map(len, few)) == [0, 0, 1, 1]
    assert [portion([], rank, 2, True) for rank in range(2)] == [[], []]


def test_one_process_keeps_the_order_of_its_examples():
    examples = [Example((9, n), (1,)) for n in (3, 1, 2)]
    assert portion(examples, 0, 1, True) is examples
