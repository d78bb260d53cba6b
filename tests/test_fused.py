"""Triton that cannot compile: found before training, said with the command that helps, and done without."""

import sysconfig

import pytest
import torch
import trl.kernels
import trl.trainer.sft_trainer  # while torch still says that there is no card
from trl.kernels import chunked_logprob

from qcft import QcftError
from qcft.check import doctor
from qcft.events import Note, Watch
from qcft.training import fused

SAYS = "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."


@pytest.fixture
def notes():
    return []


@pytest.fixture
def watch(notes):
    return Watch(lambda event: notes.append(event.text) if isinstance(event, Note) else None)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """What looks like a card, whose work is done on the CPU; its Triton finds neither a compiler nor Python.h."""
    plain = chunked_logprob.ChunkedLogProbFunction.apply

    def apply(states, *arguments):
        if chunked_logprob._use_triton(torch.device("cuda")):
            raise RuntimeError(SAYS)
        return plain(states, *arguments)

    monkeypatch.setattr(trl.kernels.ChunkedLogProbFunction, "apply", apply)
    monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", True)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "apt-get").write_text("#!/bin/sh\n")
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CC", raising=False)
    paths = {**sysconfig.get_paths(), "include": str(tmp_path)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_, **__: paths)
    return programs


def test_what_is_missing_is_named_by_the_systems_packages(card, tmp_path):
    assert fused.what_is_missing() == f"sudo apt-get install gcc {fused.PYTHON}-dev"
    (card / "gcc").write_text("#!/bin/sh\n")
    (card / "gcc").chmod(0o755)
    assert fused.what_is_missing() == f"sudo apt-get install {fused.PYTHON}-dev"
    (tmp_path / "Python.h").write_text("")
    assert fused.what_is_missing() == ""


def test_training_runs_without_triton_where_it_fails(card, watch, notes, monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device=None, **rest: ones(*size, **rest))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    fused.use_triton_where_it_works(watch)
    fused.use_triton_where_it_works(watch)
    assert len(notes) == 1
    assert SAYS[:40] in notes[0]
    assert notes[0].endswith(f"what helps: sudo apt-get install gcc {fused.PYTHON}-dev")
    assert not chunked_logprob._use_triton(torch.device("cuda"))
    assert fused.fused_step() is None


def test_doctor_names_it_as_not_needed(card, tmp_path):
    found = next(one for one in doctor.examine(tmp_path) if one.name == "fused head")
    assert not found.ok
    assert not found.needed
    assert SAYS[:40] in found.found
    assert found.mend == f"sudo apt-get install gcc {fused.PYTHON}-dev"


def test_on_a_cpu_nothing_is_tried(card, watch, notes):
    fused.use_triton_where_it_works(watch)
    assert notes == []
    assert chunked_logprob._use_triton(torch.device("cuda"))


def test_a_trl_that_has_changed_is_named(card, monkeypatch):
    monkeypatch.delattr(chunked_logprob, "_TRITON_AVAILABLE")
    with pytest.raises(QcftError, match=r"has no _TRITON_AVAILABLE .* needs for training without Triton"):
        fused.without_triton()
