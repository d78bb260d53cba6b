"""A Modelfile for Ollama: the GGUF file, a Go version of its chat template, stop tokens, the context length.

Ollama recognises the chat templates of well-known models by their text, and ignores others. So qcft renders
conversations with the template, and writes a Go template with the same output.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcft.data.render import TemplateRefused
from qcft.data.rows import Message
from qcft.data.template import Template
from qcft.errors import InputError, QcftError, short
from qcft.events import Watch
from qcft.models.gguf_vocab import adds_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = re.compile(r"([A-Za-z0-9][\w.-]*/){0,2}[A-Za-z0-9][\w.-]*(:[\w][\w.-]*)?")
CONTEXT = 8192  # tokens; a longer context's KV cache may not fit on the card that the model fits on
SYSTEM, USERS, ANSWERS = "qcftsystem", ("qcftuser0", "qcftuser1", "qcftuser2"), ("qcftanswer0", "qcftanswer1")
GO = """{{- $first := true }}
{{- range $i, $m := .Messages }}
{{- if eq $m.Role "user" }}
{{- if not $first }}TURN{{ else if $.System }}OPEN{{ $.System }}CLOSE{{ else }}START{{ end }}
{{- $first = false }}{{ $m.Content }}
{{- if eq (len (slice $.Messages $i)) 1 }}LAST{{ else }}ANSWERED{{ end }}
{{- else if eq $m.Role "assistant" }}{{ $m.Content }}
{{- end }}{{ end }}"""


@dataclass(frozen=True)
class Pieces:
    """The text that a chat template writes around the messages of a conversation.

    `start` before the first user turn, or `open` SYSTEM `close` where there is a system prompt; `answered` after a user
    turn that has an answer, `turn` between that and the next user turn, `last` after the user turn to be answered.
    """

    start: str
    open: str
    close: str
    answered: str
    turn: str
    last: str

    def render(self, users: Sequence[str], answers: Sequence[str], system: str | None) -> str:
        """A conversation up to the next answer."""
        text = self.start if system is None else f"{self.open}{system}{self.close}"
        for user, answer in zip(users, answers, strict=False):
            text += f"{user}{self.answered}{answer}{self.turn}"
        return f"{text}{users[-1]}{self.last}"


def check_name(name: str) -> None:
    """Raise InputError if Ollama does not accept this as the name of a model."""
    if not NAME.fullmatch(name) or len(name) > 200:
        raise InputError(
            f"--ollama: {name!r} is not a valid name of a model in Ollama",
            "give one such as spanish or me/spanish:q8_0",
        )


def write_modelfile(
    folder: Path, file: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], positions: int
) -> bool:
    """Write `folder/Modelfile` for the GGUF file beside it; whether its chat template could be written for Go."""
    pieces = find_pieces(tokenizer)
    lines = [f"FROM ./{file}"]
    if pieces is not None:
        lines.append(f'TEMPLATE """{go_template(pieces)}"""')
    lines += [f"PARAMETER stop {json.dumps(tokenizer.decode([one]), ensure_ascii=False)}" for one in ends]
    lines.append(f"# The model has positions for {positions:,} tokens.")
    lines.append(f"PARAMETER num_ctx {min(positions, CONTEXT)}")
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return pieces is not None


def create(name: str, folder: Path, watch: Watch) -> bool:
    """Import the folder's Modelfile into Ollama; False if Ollama is not installed. Raises QcftError."""
    program = shutil.which("ollama")
    if program is None or not os.path.isabs(program):
        return False
    modelfile = (folder / "Modelfile").resolve()
    watch.note(f"ollama create {name}")
    done = subprocess.run(
        [program, "create", name, "-f", str(modelfile)], cwd=modelfile.parent, capture_output=True, check=False
    )
    watch.check_stop()
    if done.returncode:
        output = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines() or ["no message"]
        raise QcftError(
            f"ollama create failed: {short(Exception(output[-1]))}",
            f"{folder} is complete; once `ollama serve` runs: {create_command(name, folder)}",
        )
    return True


def create_command(name: str, folder: Path) -> str:
    """The command that imports the folder's Modelfile into Ollama."""
    return f"ollama create {name} -f {shlex.quote(str(folder / 'Modelfile'))}"


def find_pieces(tokenizer: PreTrainedTokenizerBase) -> Pieces | None:
    """The text that the tokenizer's chat template writes around turns, without BOS if llama.cpp adds it itself; None
    for a template that does more than that."""
    try:
        template = Template(tokenizer, "allow")
        alone, several = _rendered(template, 1), _rendered(template, 2)
        with_system = _rendered(template, 1, SYSTEM)
        start, last = alone.split(USERS[0])
        _, answered, turn, _ = re.split("|".join((*USERS, *ANSWERS)), several)
        opened, close, _ = re.split(f"{SYSTEM}|{USERS[0]}", with_system)
        pieces = Pieces(start, opened, close, answered, turn, last)
        for turns in (1, 2, 3):
            for system in (None, SYSTEM):
                if pieces.render(USERS[:turns], ANSWERS[: turns - 1], system) != _rendered(template, turns, system):
                    return None
    except (TemplateRefused, InputError, ValueError):
        return None
    bos = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""
    return Pieces(start.removeprefix(bos), opened.removeprefix(bos), close, answered, turn, last)


def go_template(pieces: Pieces) -> str:
    """The pieces as a Go text/template over Ollama's messages."""
    words = {name.upper(): text for name, text in vars(pieces).items()}
    return re.sub("|".join(words), lambda found: _literal(words[found[0]]), GO)


def _rendered(template: Template, turns: int, system: str | None = None) -> str:
    """The template's output for this number of user turns, all answered except the last."""
    messages = [Message("system", system)] if system else []
    for number in range(turns):
        messages += [Message("assistant", ANSWERS[number - 1])] if number else []
        messages.append(Message("user", USERS[number]))
    return template.prompt(template.prepare(messages, "off")[0])


def _literal(text: str) -> str:
    """A text as an action of a Go template, which keeps its spaces and braces."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
