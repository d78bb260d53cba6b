"""Known formats of records, recognised by their columns, each converted to a `Row`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qcft.data.rows import Message, Role, Row
from qcft.recipe.yaml_file import joined

DataRecord = Mapping[str, Any]

# Names for the three roles.
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
    "ai": "assistant",
}
# Turns that belong to the use of tools. A row that has one is dropped: its other turns make no sense without it.
TOOL_ROLES = {"tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython"}
# Columns that a text model cannot see. A row with a value in them is dropped: its answer depends on it.
MEDIA = {"image": "an image", "audio": "audio", "video": "a video"}
MEDIA_COLUMNS = {f"{medium}{plural}" for medium in MEDIA for plural in ("", "s")}
WHOLE = re.compile(r"(-?\d+)\.0")  # how pandas writes a whole number in a column with missing values

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the thoughts before an answer


class Unusable(ValueError):
    """A record that cannot be trained on; its text is the reason under which it is counted."""


def to_row(record: DataRecord, format: str) -> Row:
    """The record in the one conversational form. Raises Unusable with the reason."""
    row = _row(_read(record, format), record)
    english = _english(record, format)
    return replace(row, english=english) if english else row


def to_prompt(record: DataRecord, format: str) -> Row:
    """The record's first user turn as a row, with its answer if that can be trained on. Raises Unusable."""
    messages = _read(record, format)
    try:
        return _row(messages, record)
    except Unusable:
        first = next((i for i, m in enumerate(messages) if m.role == "user" and m.content.strip()), None)
        if first is None or any(m.role == "assistant" for m in messages[:first]):
            raise
        return Row(tuple(messages[: first + 1]), (), _id(record))


def _english(record: DataRecord, format: str) -> Row | None:
    """The row's English version, from columns that end in `_en`; None if a needed column is missing."""
    if f"{PROMPT_COLUMNS[format]}_en" not in record:
        return None
    columns = {str(key)[: -len("_en")]: value for key, value in record.items() if str(key).endswith("_en")}
    try:
        if format == "alpaca" and _text(record.get("input")).strip() and "input" not in columns:
            return None
        return to_prompt({"id": record.get("id"), **columns}, format)
    except Unusable:
        return None


def _read(record: DataRecord, format: str) -> list[Message]:
    """The record's turns. Raises Unusable."""
    if not MEDIA_COLUMNS.isdisjoint(record):
        for column in MEDIA_COLUMNS & record.keys():
            if record[column]:
                raise Unusable(f"with {MEDIA[column.removesuffix('s')]}")
    turns = FORMATS[format].read(record)
    return turns if format == "text" else _with_system(_text(record.get("system")), turns)


def _alpaca(record: DataRecord) -> list[Message]:
    instruction, extra = _text(record.get("instruction")), _text(record.get("input"))
    if not instruction.strip() and not extra.strip():
        raise Unusable("no user turn")
    user = "\n\n".join(part for part in (instruction, extra) if part.strip())
    earlier = _history(record["history"]) if record.get("history") else []
    return [*earlier, Message("user", user), Message("assistant", _text(_first_accepted(record.get("output"))))]


def _first_accepted(output: Any) -> Any:
    """Of SQuAD's `{text: [...], answer_start: [...]}` the first text, or none; anything else unchanged."""
    if isinstance(output, Mapping) and isinstance(output.get("text"), list):
        return next(iter(output["text"]), None)
    return output


def _history(value: Any) -> list[Message]:
    """Earlier turns: pairs of question and answer, or turns with their roles."""
    turns = _list(value, "history")
    if all(isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in turns):
        pairs = [(_text(question), _text(answer)) for question, answer in turns]
        return [m for question, answer in pairs for m in (Message("user", question), Message("assistant", answer))]
    return [_message(turn) for turn in turns]


def _prompt_completion(record: DataRecord) -> list[Message]:
    prompt, completion = _conversation(record.get("prompt")), _conversation(record.get("completion"))
    match completion:
        case [{"role": "text", "content": content}]:  # a document in a replay.jsonl
            return _document({"text": content})
    before = _turns(prompt) if isinstance(prompt, list) else [Message("user", _text(prompt))]
    after = _turns(completion) if isinstance(completion, list) else [Message("assistant", _text(completion))]
    return [*(replace(m, train=False) if m.role == "assistant" else m for m in before), *after]


def _document(record: DataRecord) -> list[Message]:
    text = _text(record.get("text"))
    if not text.strip():
        raise Unusable("empty document" if "text" in record else "no column text")
    return [Message("text", text)]


@dataclass(frozen=True)
class Format:
    """One format of records: its reader, the columns it needs (the prompt's column first), the columns it may have, and
    how messages describe them."""

    read: Callable[[DataRecord], list[Message]]
    needs: tuple[str, ...]
    may_have: tuple[str, ...] = ("system",)
    described: str = ""


FORMATS = {
    "messages": Format(lambda record: _turns(record.get("messages")), ("messages",)),
    "sharegpt": Format(lambda record: _turns(record.get("conversations")), ("conversations",)),
    "alpaca": Format(
        _alpaca, ("instruction", "output"), ("input", "system", "history"), "instruction, input (optional), output"
    ),
    "prompt-completion": Format(_prompt_completion, ("prompt", "completion")),
    "text": Format(_document, ("text",), (), "text alone, or format: text: raw text"),
}
ALONE = {"text", "id"}  # only these columns are read as raw text by themselves: with others it may be something else
COLUMNS = {name: one.described or ", ".join(one.needs) for name, one in FORMATS.items()}
PROMPT_COLUMNS = {name: one.needs[0] for name, one in FORMATS.items()}


def detect_format(columns: set[str], answers: bool = True) -> str | None:
    """The format with these columns (with `answers`, including its answer's column), or None."""
    most = None if answers else 1
    found = next((name for name in PROMPT_COLUMNS if columns.issuperset(FORMATS[name].needs[:most])), None)
    return found if found != "text" or {str(name).strip().lower() for name in columns} <= ALONE else None


def column_names(record: Mapping[str, Any]) -> str:
    """The columns of a record, for a message."""
    names = [str(key)[:40] for key in record]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "(none)"


def _turns(value: Any) -> list[Message]:
    return [_message(turn) for turn in _list(value, "conversation")]


def _list(value: Any, what: str) -> list[Any]:
    found = _parsed(value)
    if not isinstance(found, list):
        raise Unusable(f"no {what}")
    return found


def _message(given: Any) -> Message:
    """One turn, from `role` or `from`, and `content` or `value`, whichever is not null. Raises Unusable."""
    turn = _parsed(given)
    if isinstance(turn, list) and all(isinstance(item, tuple) and len(item) == 2 for item in turn):
        turn = dict(turn)  # Arrow's maps
    if not isinstance(turn, Mapping):
        raise Unusable("no conversation")
    name = str(turn.get("role") or turn.get("from") or "").lower()
    if name in TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
        raise Unusable("with a tool call")
    if name not in ROLES:
        raise Unusable(f"unknown role {name[:20]!r}")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    return _marked(ROLES[name], _text(content), turn)


def _with_system(system: str, messages: list[Message]) -> list[Message]:
    """The turns with the system prompt of a `system` column: one system turn, with both texts if they differ."""
    if not system.strip():
        return messages
    if not messages or messages[0].role != "system":
        return [Message("system", system), *messages]
    if messages[0].content.strip() == system.strip():
        return messages
    return [replace(messages[0], content=f"{system}\n\n{messages[0].content}"), *messages[1:]]


def _marked(role: Role, text: str, turn: Mapping[str, Any]) -> Message:
    """A turn with its other fields: whether an answer is trained, the reasoning before it, whether it was truncated.

    Raises Unusable.
    """
    if role != "assistant":
        return Message(role, text)
    weight, train = turn.get("weight"), turn.get("train")
    if weight not in (None, 0, 1):
        raise Unusable("a weight other than 0 and 1")
    if train not in (None, False, True):
        raise Unusable("train is neither true nor false")
    reasoning = next((_text(turn[key]) for key in REASONING if turn.get(key)), "")
    trained, thoughts = weight != 0 and train is not False, reasoning if reasoning.strip() else None
    return Message(role, text, trained, thoughts, turn.get("finished") is not False)


def _row(messages: list[Message], record: DataRecord) -> Row:
    """Split a conversation into prompt and completion, after checking that it can be trained on; a document is only
    completion."""
    if messages and messages[0].role == "text":
        return Row((), tuple(messages), _id(record))
    while messages and messages[-1].role != "assistant":
        messages = messages[:-1]  # a question without an answer trains nothing
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


def _id(record: DataRecord) -> str | None:
    """The id as text; a whole number is the same id as text, as an integer and as a float (`15.0`)."""
    identity = record.get("id")
    if identity is None or identity == "" or identity != identity:  # pandas' missing value is NaN
        return None
    if isinstance(identity, float) and identity.is_integer():
        identity = int(identity)
    text = _valid(str(identity))
    whole = WHOLE.fullmatch(text)
    return whole[1] if whole else text


def _text(value: Any) -> str:
    """A cell as text; null is empty. Raises Unusable for a cell that is not text."""
    if value is None or (isinstance(value, float) and value != value):  # CSV's empty cell is NaN
        return ""
    if isinstance(value, list) and all(isinstance(part, Mapping) for part in value):
        return "".join(map(_part, value))
    if isinstance(value, (str, int, float)):
        return _valid(str(value))
    if isinstance(value, bytes):
        return _decoded(value)
    raise Unusable("no text")


def _part(part: DataRecord) -> str:
    """The text of a typed part of a message. Raises Unusable for a part that holds something else."""
    kind = str(part.get("type") or "text")
    medium = next((medium for word, medium in MEDIA.items() if word in kind), None)
    if medium or (part.get("text") is None and kind != "text"):
        raise Unusable(f"with {medium or f'a part of type {kind[:20]!r}'}")
    return _text(part.get("text"))


def _parsed(value: Any) -> Any:
    """The list or mapping in a text that is JSON or Python's repr of one; anything else unchanged."""
    text = _decoded(value) if isinstance(value, bytes) else value
    if isinstance(text, str) and text.lstrip()[:1] in {"[", "{"}:
        for read in (json.loads, ast.literal_eval):
            try:
                return read(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return value


def _conversation(value: Any) -> Any:
    """`_parsed`, but only if the result is turns with known roles: an answer may be JSON itself."""
    found = _parsed(value)
    known = isinstance(found, list) and all(isinstance(t, dict) and str(t.get("role")).lower() in ROLES for t in found)
    return found if known else value


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise Unusable("no text") from None


def _valid(text: str) -> str:
    """Text that can be written: JSON's escapes can contain a lone surrogate. Raises Unusable."""
    try:
        text.encode()
    except UnicodeEncodeError:
        whole = joined(text)  # escaped pairs, in a list that was stored as text
        if whole == text:
            raise Unusable("broken Unicode") from None
        return _valid(whole)
    return text
