"""For every test: no network, no hub, and no CUDA test on a machine without a GPU. The models are those of tiny.py."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # on more threads models this small only wait for each other

import pytest
from pytest_socket import disable_socket


def pytest_runtest_setup():
    disable_socket(allow_unix_socket=True)


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and torch finds none here"))


@pytest.fixture(scope="module")
def one_thread():
    """Torch on one thread: many times faster for products of 64 columns, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_process(tmp_path, monkeypatch):
    """What a run finds in a process of its own, for the pretended GPU, whose modes belong to one thread."""
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def chatml():
    """A tokenizer with a ChatML template that writes a default system prompt."""
    from making.tiny import family

    return family("chatml_default")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, chatml):
    """A Hugging Face folder with a random two-layer Llama of 64 dimensions that speaks ChatML."""
    from making.tiny import save_model

    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama", chatml)
