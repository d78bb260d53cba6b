"""The form that every data set is converted to: a conversational prompt and its completion, or a raw text document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "text"]  # text: a whole document
_AS_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Message:
    """One turn. `train`: whether an assistant's turn has loss; `reasoning`: the thoughts before its text; `finished`:
    false for a truncated answer, whose end of turn has no loss."""

    role: Role
    content: str
    train: bool = True
    reasoning: str | None = None
    finished: bool = True

    def as_dict(self) -> dict[str, object]:
        """The turn as plain data, without fields that have their default."""
        return {
            "role": self.role,
            "content": self.content,
            **({} if self.train else {"train": False}),
            **({"reasoning_content": self.reasoning} if self.reasoning is not None else {}),
            **({} if self.finished else {"finished": False}),
        }


@dataclass(frozen=True)
class Row:
    """A conversation. `prompt` ends with the first user turn; `completion` begins with the first assistant turn and
    has all later turns. Every assistant turn is trained unless its `train` is false, and nothing else is.

    A document of raw text has no prompt, and a completion of one turn with the role `text`.

    `id` is shared by the translations of one row, where the data has such ids. `english` is the row's English
    version, where the data has one in columns such as `instruction_en`; it may lack a completion.
    """

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    id: str | None = None
    english: Row | None = field(default=None, compare=False)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole conversation, in order."""
        return self.prompt + self.completion

    @property
    def reference(self) -> str | None:
        """The row's own answer to its prompt; None if it has none."""
        return self.completion[0].content if self.completion else None

    @property
    def text(self) -> str | None:
        """The document of raw text; None for a conversation."""
        return None if self.prompt else self.completion[0].content

    @cached_property
    def prompt_digest(self) -> str:
        """Digest of the first user turn (without a system turn), or of a whole document."""
        if self.text is not None:
            return hashlib.sha256(b"text:" + self.text.strip().encode()).hexdigest()
        text = "\n".join(m.content.strip() for m in self.prompt if m.role != "system")
        return hashlib.sha256(b"prompt:" + text.encode()).hexdigest()

    @property
    def key(self) -> str:
        """Digest of the parallel id, or of the prompt if there is none."""
        if self.id is not None:
            return hashlib.sha256(b"id:" + self.id.encode()).hexdigest()
        return self.prompt_digest

    @property
    def name(self) -> str:
        """The row's name in messages: its id, else the beginning of its prompt or document."""
        text = self.prompt[-1].content if self.text is None else self.text
        return self.id if self.id is not None else " ".join(text.split())[:40]

    def is_held_out(self, share: float) -> bool:
        """Whether the row belongs to the held-out `share` of all rows: decided by its key alone, so
        that translations stay together and every arm sets the same rows aside."""
        return int(self.key[:13], 16) / 16**13 < share

    def as_dict(self) -> dict[str, object]:
        """The row as plain data, in TRL's conversational prompt-completion form."""
        return {
            "id": self.id,
            "prompt": [m.as_dict() for m in self.prompt],
            "completion": [m.as_dict() for m in self.completion],
        }


def message_from(turn: Mapping[str, Any]) -> Message:
    """A turn from the output of `Message.as_dict`."""
    reasoning, finished = turn.get("reasoning_content"), turn.get("finished", True)
    return Message(turn["role"], turn["content"], turn.get("train", True), reasoning, finished)


def digest_rows(rows: Iterable[Row]) -> str:
    """A digest of rows and their order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(_AS_JSON.encode(row.as_dict()).encode() + b"\n")
    return total.hexdigest()
