"""Flags of every command given wrong: empty, beyond all measure, or leading nowhere."""

import json

import pytest
import typer
import yaml

from qcft.cli import app
from qcft.recipe import recipe_from
from qcft.store import open_run

from .helpers.bad_input import check_refused
from .helpers.tiny import write_rows

COMMANDS = typer.main.get_command(app).commands
# Every flag of every command that takes a value.
FLAGS = [
    (name, flag)
    for name, command in sorted(COMMANDS.items())
    for param in command.params
    if param.param_type_name == "option" and not getattr(param, "is_flag", False)
    for flag in param.opts[:1]
]


def command(*arguments):
    return list(arguments)


def by(text):
    return command("dial", "tiny", "--by", text)


def gguf(*flags):
    return command("export", "tiny", "--to", "out", *flags)


HUGE = "9" * 400
CASES = {
    # lists of nothing
    "arms of nothing": (command("ablate", "ablation.yaml", "--arms", ","), "--arms"),
    "seeds of nothing": (command("ablate", "ablation.yaml", "--seeds", " , "), "--seeds"),
    "an engine without a name": (command("ablate", "ablation.yaml", "--on", ":head"), "--on"),
    "a cluster without an address": (command("ablate", "ablation.yaml", "--on", "ray:"), "--on"),
    "data of nothing in a language": (command("phase1", "x", "--model", "tiny", "--data", "en="), "is missing"),
    "data of a blank": (command("phase1", "x", "--model", "tiny", "--data", "en= "), "path is missing"),
    "a second data set of nothing": (command("similarity", "en.jsonl,", "en.jsonl"), "''"),
    "a phase of nothing": (command("similarity", "tiny:", "en.jsonl"), "tiny has no phase ''"),
    "columns of nothing": (command("phase1", "x", "--model", "m", "--data", "en.jsonl", "--columns", ","), "--columns"),
    "a task of nothing": (command("eval", "tiny", "--local", "=en.jsonl"), "--local"),
    "a copy of nothing": (command("eval", "tiny", "--local", "xquad_es="), "--local"),
    "a key of nothing": (command("run", "recipe.yaml", "--set", "=1"), "--set"),
    "text of nothing": (command("drift", "tiny", "--text", "en="), "--text"),
    # numbers
    "fewer rows than none": (command("check", "recipe.yaml", "--rows", "-1"), "--rows"),
    "a card by an exponent": (command("check", "recipe.yaml", "--vram", "1e30GB"), "--vram"),
    "a card beyond all cards": (command("check", "recipe.yaml", "--vram", "1000000000000GB"), "--vram"),
    "a card with 400 digits": (command("check", "recipe.yaml", "--vram", f"{HUGE}GB"), "--vram"),
    "a card of nothing": (command("check", "recipe.yaml", "--vram", "0GB"), "--vram"),
    "steps too small to count": (command("dial", "tiny", "--scales", "0:1e308:1e-300"), "--scales"),
    "steps beyond counting": (command("dial", "tiny", "--scales", "0:1:1e-320"), "--scales"),
    "scales without end": (command("dial", "tiny", "--scales", "0:inf:1"), "--scales"),
    "scales that are not numbers": (command("dial", "tiny", "--scales", "0,nan"), "--scales"),
    "scales of nothing": (command("dial", "tiny", "--scales", ","), "--scales"),
    "scales from the end": (command("dial", "tiny", "--scales", "1:0:0.1"), "--scales"),
    "a scale beyond all scales": (command("dial", "tiny", "--scales", "0,1e300"), "--scales"),
    "a density that is not a number": (command("dial", "tiny", "--density", "nan"), "--density"),
    "a scale to merge at that is not a number": (command("dial", "tiny", "--merge-at", "nan"), "--merge-at"),
    "a scale to merge at without end": (command("dial", "tiny", "--merge-at", "1e300"), "--merge-at"),
    "a pick of more than all": (command("dial", "tiny", "--pick", "1.5"), "--pick 1.5 is outside"),
    "a pick of nothing": (command("dial", "tiny", "--pick", "0"), "--pick 0 is outside"),
    "a pick that is not a number": (command("dial", "tiny", "--pick", "nan"), "--pick nan is outside"),
    "layers that overlap": (by("layers=0-2:0.5,2-3:0"), "0-2 and 2-3 overlap"),
    "a layer named twice": (by("layers=1:0.5,1:0.5"), "1 and 1 overlap"),
    "a layer's scale that is a word": (by("layers=0-2:half"), "'half' is not a scale"),
    "a layer's scale that is missing": (by("layers=0-2:"), "'' is not a scale"),
    "a layer's scale below nothing": (by("layers=0-2:-0.5"), "'-0.5' is not a scale"),
    "a layer's scale that is not a number": (by("layers=0-2:nan"), "'nan' is not a scale"),
    "a layer's scale without end": (by("layers=0-2:inf"), "'inf' is not a scale"),
    "layers without a scale": (by("layers=0-2"), "is not a range of layers and a scale"),
    "layers that are not named so": (by("0-2:0.5"), "does not begin with 'layers='"),
    "no layers": (by("layers="), "is not a range of layers and a scale"),
    "layers with a comma too many": (by("layers=0:0.5,"), "is not a range of layers and a scale"),
    "layers counted backwards": (by("layers=5-3:0.5"), "5-3 is empty"),
    "layers below the first": (by("layers=-1:0.5"), "is not a range of layers and a scale"),
    "a layer with 400 digits": (by(f"layers={HUGE}:0.5"), "is not a range of layers and a scale"),
    "layers that keep all": (by("layers=0-2:1"), "every scale is 1"),
    "patterns with a method": (command("dial", "tiny", "--by", "auto", "--method", "ties"), "--by cannot be combined"),
    "a merge at a scale and by layers": (command("merge", "tiny", "--scale", "1", "--by", "layers=0:0"), "two ways"),
    "a merge at no number": (command("merge", "tiny", "--scale", "nan"), "--scale"),
    "a merge by patterns": (command("merge", "tiny", "--by", "auto"), "does not begin with 'layers='"),
    "an export by no layers": (command("export", "tiny", "--to", "out", "--by", "layers="), "is not a range"),
    "a GGUF of an unknown type": (gguf("--gguf", "q3"), "--gguf 'q3' is not known"),
    "a GGUF of an adapter": (gguf("--gguf", "q8_0", "--adapter-only"), "--gguf cannot be combined with --adapter-only"),
    "an adapter for Ollama": (gguf("--ollama", "x", "--adapter-only"), "--ollama cannot be combined with"),
    "a GGUF in four bits without a quantizer": (gguf("--gguf", "q4_k_m"), "was not found on PATH"),
    "a folder without llama.cpp": (gguf("--gguf", "f16", "--llama-cpp", "runs"), "holds neither"),
    "a folder of llama.cpp that is not there": (gguf("--gguf", "f16", "--llama-cpp", "none"), "holds neither"),
    "llama.cpp for no GGUF": (gguf("--llama-cpp", "runs"), "--llama-cpp needs --gguf"),
    "a name that Ollama has no place for": (gguf("--ollama", "bad name!"), "--ollama: 'bad name!' is not a valid name"),
    "a repository without its owner": (gguf("--push", "norepo"), "--push: 'norepo' is not a repository name"),
    "a repository of three parts": (gguf("--push", "a/b/c", "--yes"), "is not a repository name"),
    "a repository that nobody confirms": (gguf("--push", "me/tiny"), "there is no terminal to confirm"),
    "an upload without a hub": (gguf("--push", "me/tiny", "--yes"), "HF_HUB_OFFLINE is set"),
    "everybody may read nothing": (gguf("--public"), "--public needs --push"),
    "a ratio that is not a number": (command("replay", "tiny", "--ratio", "nan"), "ratio"),
    "a replay below nothing": (command("phase2", "tiny", "--replay", "-0.1", "--data", "es=en.jsonl"), "ratio"),
    "a ratio in percent": (command("phase2", "tiny", "--replay", "20%"), "--replay '20%' is not a number"),
    "a number of rows in words": (command("phase2", "tiny", "--take", "ten"), "--take 'ten' is not a whole number"),
    "a base of another kind": (command("merge", "tiny", "--base", "x"), "'--base': 'x' is not one of 'original', "),
    "a take of nothing": (command("phase1", "x", "--model", "tiny", "--data", "en.jsonl", "--take", "0"), "take"),
    "a limit below nothing": (command("eval", "tiny", "--task", "hellaswag", "--limit", "-5"), "limit"),
    "shots below nothing": (command("eval", "tiny", "--task", "hellaswag", "--shots", "-1"), "shots"),
    "answers without a token": (command("eval", "tiny", "--task", "fidelity", "--max-new-tokens", "0"), "max_new"),
    "seeds below nothing": (command("ablate", "ablation.yaml", "--seeds", "-1"), "--seeds"),
    "seeds with 400 digits": (command("ablate", "ablation.yaml", "--seeds", HUGE), "seed"),
    "seeds in other digits": (command("ablate", "ablation.yaml", "--seeds", "²"), "--seeds"),
    "two models chosen twice": (command("drift", "tiny", "--apart", "--to", "phase1"), "--apart chooses both models"),
    "apart from a phase not done": (command("drift", "tiny", "--apart"), "phase1 of the run 'tiny' is not done"),
    "a pattern that no arm matches": (command("ablate", "ablation.yaml", "--arms", "x*"), "no arm 'x*'"),
    "a list of no arms": (command("ablate", "ablation.yaml", "--list", "--arms", ","), "--arms"),
    "a check of neither recipe nor run": (command("check", "nope"), "no recipe 'nope'"),
    "a check of a replay beyond all": (command("check", "tiny", "--replay", "2"), "ratio"),
    "a check of data of nothing": (command("check", "tiny", "--data", "es="), "is missing"),
    "a removal of what is not there": (command("rm", "tiny", "nope"), "no run 'nope'"),
    "a short flag of nothing": (command("ls", "-r", ""), "-r: the value given is empty"),
    "a drift of no rows": (command("drift", "tiny", "--rows", "0"), "--rows"),
    "no rows to compare": (command("compare", "tiny", "-n", "0"), "-n"),
    "rows to compare that are not a number": (command("compare", "tiny", "-n", "few"), "-n"),
    "compared answers without a token": (command("compare", "tiny", "--max-new-tokens", "0"), "--max-new-tokens"),
    "answers in a chat without a token": (command("chat", "tiny", "--max-new-tokens", "0"), "--max-new-tokens"),
    "a temperature below nothing": (command("chat", "tiny", "--temperature", "-1"), "temperature: -1"),
    "a temperature that is not a number": (command("chat", "tiny", "--temperature", "nan"), "temperature: nan"),
    "a temperature without end": (command("chat", "tiny", "--temperature", "1e300"), "temperature: 1e+300"),
    "a temperature next to nothing": (command("chat", "tiny", "--temperature", "1e-300"), "temperature: 1e-300"),
    # stages that answer
    "no phase that can be compared": (command("compare", "tiny"), "no phase of the run 'tiny' is done"),
    "no phase to chat with": (command("chat", "tiny"), "no phase of the run 'tiny' is done"),
    "a compared stage that is not there": (command("compare", "tiny", "--stage", "phase9"), "has no stage 'phase9'"),
    "a stage to chat with that is not there": (command("chat", "tiny", "--stage", "phase9"), "has no stage 'phase9'"),
    "a stage to chat with that is not done": (command("chat", "tiny", "--stage", "phase1"), "phase1 of the run 'tiny'"),
    "a run to chat with that is not there": (command("chat", "tony"), "there is no run 'tony'"),
    "a language without held-out rows": (command("compare", "tiny", "--stage", "base", "--lang", "xx"), "'xx'"),
    "a file of prompts that is not there": (command("compare", "tiny", "--prompts", "none.txt"), "there is no file"),
    "a file of prompts of nothing": (command("compare", "tiny", "--prompts", "blank.txt"), "no line of text"),
    "a file of prompts in bytes": (command("compare", "tiny", "--prompts", "bytes.txt"), "cannot be read as text"),
    "a file of prompts of zeros": (command("compare", "tiny", "--prompts", "zeros.txt"), "is binary"),
    "a folder of prompts": (command("compare", "tiny", "--prompts", "runs"), "cannot be read as text"),
    "a device of prompts": (command("compare", "tiny", "--prompts", "/dev/zero"), "is a device"),
    "a page that is not a page": (command("compare", "tiny", "--to", "en.jsonl"), "is not an .html file"),
    "a page in no folder": (command("compare", "tiny", "--to", "none/page.html"), "cannot be written"),
    "a page in a file": (command("compare", "tiny", "--to", "en.jsonl/page.html"), "cannot be written"),
    "a page in a folder that is not written to": (command("compare", "tiny", "--to", "/proc/page.html"), "written"),
    "replay shown below nothing": (command("replay", "tiny", "--show", "-1"), "--show"),
}  # fmt: skip


@pytest.fixture
def place(raw_recipe, tiny_model, tmp_path, monkeypatch):
    """A folder with a recipe, an ablation, and a run in runs/ of which nothing is done."""
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw_recipe))
    raw = {**raw_recipe, "ablation": {"arms": [{"name": "plain"}], "seeds": [0]}}
    (tmp_path / "ablation.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "tiny").symlink_to(tiny_model)
    write_rows(tmp_path / "en.jsonl", [{"instruction": f"what is {i}", "output": "red"} for i in range(40)])
    for name, content in (("blank.txt", b" \n\n"), ("bytes.txt", b"caf\xe9\n"), ("zeros.txt", b"\0\0\n")):
        (tmp_path / name).write_bytes(content)
    open_run(tmp_path / "runs", recipe_from(raw_recipe), {"phase1": "train-0000000000"})
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_bad_flags_give_two_lines_and_nothing_is_written(qcft, place, case):
    check_refused(qcft, place, *CASES[case])


@pytest.mark.parametrize(("name", "flag"), FLAGS, ids=lambda part: part)
def test_no_flag_accepts_an_empty_value(qcft, place, name, flag):
    check_refused(qcft, place, [name, flag, ""], f"{flag}: the value given is empty")
    check_refused(qcft, place, [name, f"{flag}="], f"{flag}: the value given is empty")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_no_argument_is_empty(qcft, place, name):
    check_refused(qcft, place, [name, " "], "an argument is empty")


def test_more_rows_than_there_are_are_all_that_there_are(qcft, place):
    code, out, err = qcft("check", "recipe.yaml", "--rows", "1000000000", "--json")
    assert code == 0, err
    assert [len(phase["samples"]) for phase in json.loads(out)["phases"]] == [24, 24]
