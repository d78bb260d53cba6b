"""Tiny models, tokenizers and data, made on the spot; no network, no mocks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from qcft.runner.libraries import set_environment

from .helpers.tiny import make_color_data, make_llama, make_recipe, make_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# More threads make tiny models slower, and tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
set_environment()  # before any library is loaded, as the command line does


def pytest_collection_modifyitems(items):
    """Real weights first: the longest test runs beside the others, not after them."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer) -> Path:
    return make_llama(tmp_path_factory.mktemp("tiny-llama"), tokenizer)


@pytest.fixture(scope="session")
def color_data(tmp_path_factory) -> Path:
    return make_color_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def raw_recipe(tiny_model, color_data) -> dict:
    return make_recipe(tiny_model, color_data)


@pytest.fixture
def qcft(monkeypatch, capsys, tmp_path):
    """Run the command line in this process, in a folder of its own: (exit code, stdout, stderr)."""
    from qcft.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # `main` sets it, for this test only

    def run(*arguments: str) -> tuple[int, str, str]:
        import signal

        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        monkeypatch.setattr(sys, "argv", ["qcft", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return run
