"""What `--help` shows: every default, an example that parses, the groups of commands; completion."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from qcft.cli import app
from qcft.cli.grouped import GROUPS

COMMANDS = typer.main.get_command(app).commands
ROOT = Path(__file__).parents[1]


def default_of(param):
    """A parameter's default in words; None where it has none that would say anything."""
    if isinstance(param.show_default, str):
        return f"({param.show_default})"
    if param.required or param.default is None or isinstance(param.default, bool) or callable(param.default):
        return None
    return str(getattr(param.default, "value", param.default))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_default_is_shown_and_every_text_says_something(qcft, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = qcft(name, "-h")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    shown = " ".join(out.split())
    for param in COMMANDS[name].params:
        if getattr(param, "hidden", False):
            continue
        assert param.help, param.name
        assert param.help.split(".")[0].split("--")[0].split()[0] in shown
        default = default_of(param)
        if default is not None:
            assert f"default: {default}" in shown, param.name
    assert "<bool>" not in out
    assert "Name of the run ." not in out


def test_there_are_defaults_of_each_kind():
    """The test above tests nothing unless there are some: words, numbers and paths."""
    found = {default_of(param) for command in COMMANDS.values() for param in command.params} - {None}
    assert {"(the latest)", "(the last phase)", "(LaBSE)", "runs", "0.5", "original", "16"} <= found


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_ends_with_an_example_that_parses(name):
    _, _, example = COMMANDS[name].epilog.partition("Example: ")
    program, given, *arguments = shlex.split(example)
    assert (program, given) == ("qcft", name)
    assert COMMANDS[name].make_context(name, arguments).params is not None


def test_commands_are_in_groups(qcft):
    _, out, _ = qcft("--help")
    assert {command.rich_help_panel for command in COMMANDS.values()} == set(GROUPS)
    at = [out.index(f"\n{group}:\n") for group in GROUPS]
    assert at == sorted(at)
    assert all(f"\n  {name}  " in out for name in COMMANDS)
    assert qcft("-h")[1] == qcft()[1] == out


def test_short_flags_are_the_ecosystems():
    short = {}
    for command in COMMANDS.values():
        for param in command.params:
            for flag in param.opts:
                if param.param_type_name == "option" and not flag.startswith("--"):
                    short.setdefault(flag, set()).add(param.opts[0])
    assert short == {
        "-d": {"--data"},
        "-l": {"--list"},
        "-m": {"--model"},
        "-n": {"--dry-run", "--rows"},  # as of make, and of head
        "-o": {"--to"},
        "-q": {"--quiet"},
        "-r": {"--runs"},
        "-y": {"--yes"},
    }


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip


def test_help_loads_no_heavy_library():
    script = (
        "import sys; sys.argv = ['qcft', '--help']\n"
        "from qcft.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'pydantic', 'rich.markdown'} & set(sys.modules)))"
    )
    assert python("-c", script).stdout.splitlines()[-1] == "[]"


def test_completion_is_typers_own():
    """The script for a shell, and what it asks for: commands and flags."""
    script = "import sys; sys.argv[0] = 'qcft'; from qcft.cli import main; main()"
    shown = python("-c", script, "--show-completion", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert shown.returncode in (0, 2)
    asked = {"_QCFT_COMPLETE": "complete_bash", "COMP_WORDS": "qcft si", "COMP_CWORD": "1"}
    assert python("-c", script, **asked).stdout.split() == ["similarity"]
    asked |= {"COMP_WORDS": "qcft dial --sc", "COMP_CWORD": "2"}
    assert python("-c", script, **asked).stdout.split() == ["--scales"]


def test_a_shell_that_is_not_known_is_bad_input():
    script = "import sys; sys.argv[0] = 'qcft'; from qcft.cli import main; main()"
    done = python("-c", script, "--show-completion", "tcsh", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 2
    assert "'tcsh' is not one of" in done.stderr
