"""Known shapes of records, recognised by their columns, each turned into a `Row`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from qcft.data.rows import Message, Role, Row

Record = Mapping[str, Any]

# What people call the three roles.
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}

REASONING = ("reasoning_content", "thinking", "reasoning")  # what the thoughts before an answer are called


class Unusable(ValueError):
    """A record that cannot train; its text is the reason it is counted under."""


def detect_format(columns: set[str]) -> str | None:
    """The format whose columns these are, or None."""
    if "messages" in columns:
        return "messages"
    if "conversations" in columns:
        return "sharegpt"
    if {"instruction", "output"} <= columns:
        return "alpaca"
    if {"prompt", "completion"} <= columns:
        return "prompt-completion"
    return None


def to_row(record: Record, format: str) -> Row:
    """The record in the one conversational form. Raises Unusable with the reason."""
    row = _row(READERS[format](record), record)
    english = _english(record, format)
    return replace(row, english=english) if english else row


def detect_prompts(columns: set[str]) -> str | None:
    """The format of records that need no answers, or None."""
    return next((format for format, column in PROMPT_COLUMNS.items() if column in columns), None)


def to_prompt(record: Record, format: str) -> Row:
    """The record's first user turn as a row, with what was answered where that can train. Raises Unusable."""
    messages = READERS[format](record)
    try:
        return _row(messages, record)
    except Unusable:
        first = next((i for i, m in enumerate(messages) if m.role == "user" and m.content.strip()), None)
        if first is None or any(m.role == "assistant" for m in messages[:first]):
            raise
        return Row(tuple(messages[: first + 1]), (), _id(record))


def _english(record: Record, format: str) -> Row | None:
    """The row's English version, from columns that end in `_en`; None where they do not say all it asks."""
    columns = {str(key)[: -len("_en")]: value for key, value in record.items() if str(key).endswith("_en")}
    if PROMPT_COLUMNS[format] not in columns:
        return None
    try:
        if format == "alpaca" and _text(record.get("input")).strip() and "input" not in columns:
            return None
        return to_prompt({"id": record.get("id"), **columns}, format)
    except Unusable:
        return None


def _alpaca(record: Record) -> list[Message]:
    instruction, extra = _text(record.get("instruction")), _text(record.get("input"))
    if not instruction.strip() and not extra.strip():
        raise Unusable("no user turn")
    user = "\n\n".join(part for part in (instruction, extra) if part.strip())
    system = _text(record.get("system"))
    return [
        *([Message("system", system)] if system.strip() else []),
        Message("user", user),
        Message("assistant", _text(record.get("output"))),
    ]


def _sharegpt(record: Record) -> list[Message]:
    return _turns(record.get("conversations"), record)


def _messages(record: Record) -> list[Message]:
    return _turns(record.get("messages"), record)


def _prompt_completion(record: Record) -> list[Message]:
    prompt, completion = record.get("prompt"), record.get("completion")
    before = _turns(prompt, record) if isinstance(prompt, list) else [Message("user", _text(prompt))]
    after = _turns(completion, {}) if isinstance(completion, list) else [Message("assistant", _text(completion))]
    return [*(replace(m, train=False) if m.role == "assistant" else m for m in before), *after]


READERS: dict[str, Callable[[Record], list[Message]]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt-completion": _prompt_completion,
}

# The column that holds each format's prompts.
PROMPT_COLUMNS = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction",
    "prompt-completion": "prompt",
}

# The columns each format needs, for the message when they are missing.
COLUMNS = {
    "alpaca": "instruction, input (optional), output",
    "sharegpt": "conversations",
    "messages": "messages",
    "prompt-completion": "prompt, completion",
}


def column_names(record: Mapping[str, Any]) -> str:
    """The columns of a record, for a message."""
    names = [str(key)[:40] for key in record]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "(none)"


def _turns(value: Any, record: Record) -> list[Message]:
    if not isinstance(value, list):
        raise Unusable("no conversation")
    messages = []
    system = _text(record.get("system"))
    if system.strip():
        messages.append(Message("system", system))
    for turn in value:
        if not isinstance(turn, Mapping):
            raise Unusable("no conversation")
        name = str(turn.get("role") or turn.get("from") or "").lower()
        if name not in ROLES:
            raise Unusable(f"unknown role {name[:20]!r}")
        content = turn.get("content") if "content" in turn else turn.get("value")
        messages.append(_message(ROLES[name], _text(content), turn))
    if [message.role for message in messages[:2]] == ["system", "system"]:  # a column and a turn say it
        texts = dict.fromkeys(message.content.strip() for message in messages[:2])
        messages[:2] = [Message("system", "\n\n".join(texts))]
    return messages


def _message(role: Role, text: str, turn: Record) -> Message:
    """A turn with what else it says: whether an answer is trained, and the reasoning before it. Raises Unusable."""
    if role != "assistant":
        return Message(role, text)
    weight, train = turn.get("weight"), turn.get("train")
    if weight not in (None, 0, 1):
        raise Unusable("a weight other than 0 and 1")
    if train not in (None, False, True):
        raise Unusable("train is neither true nor false")
    reasoning = next((_text(turn[key]) for key in REASONING if turn.get(key)), "")
    return Message(role, text, weight != 0 and train is not False, reasoning if reasoning.strip() else None)


def _row(messages: list[Message], record: Record) -> Row:
    """Cut a conversation into prompt and completion, after checking that it can train."""
    while messages and messages[-1].role != "assistant":
        messages = messages[:-1]  # a question nobody answered trains nothing
    first = next((i for i, m in enumerate(messages) if m.role == "user" and m.content.strip()), None)
    if first is None:
        raise Unusable("no user turn" if messages else "no answer")
    answer = next((i for i in range(first, len(messages)) if messages[i].role == "assistant"), len(messages))
    if any(m.role == "assistant" for m in messages[:first]):
        raise Unusable("answer before the first user turn")
    if any(not m.content.strip() for m in messages[answer:] if m.role == "assistant"):
        raise Unusable("empty answer")
    if not any(m.train for m in messages if m.role == "assistant"):
        raise Unusable("no answer to train")
    return Row(prompt=tuple(messages[:answer]), completion=tuple(messages[answer:]), id=_id(record))


def _id(record: Record) -> str | None:
    identity = record.get("id")
    return None if identity is None or identity == "" else _valid(str(identity))


def _text(value: Any) -> str:
    """A cell as text; null is empty. Raises Unusable for a cell that holds no text."""
    if value is None or (isinstance(value, float) and value != value):  # CSV's empty cell is NaN
        return ""
    if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
        return "".join(_text(part.get("text")) for part in value)  # content in typed parts
    if isinstance(value, (str, int, float)):
        return _valid(str(value))
    raise Unusable("no text")


def _valid(text: str) -> str:
    """Text that can be written: JSON's escapes can hold half a character. Raises Unusable."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("broken Unicode") from None
    return text
