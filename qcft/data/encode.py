"""From conversations to tokens: the chat template, the trained tokens, the limit on length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcft.data.rows import Message, Row
from qcft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that bears no loss

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + 'END' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class EncodedRow:
    """Token ids and, of the same length, labels: the id where loss falls, else -100. `source`: where it is from;
    `name`: what a person finds it by."""

    input_ids: list[int]
    labels: list[int]
    source: str = ""
    name: str = ""

    @property
    def answer_tokens(self) -> int:
        """How many tokens bear loss."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class EncodedSet:
    """Encoded rows with the rows they came from; `left_out` counts the others by reason."""

    rows: tuple[Row, ...]
    encoded: tuple[EncodedRow, ...]
    left_out: dict[str, int]

    @property
    def tokens(self) -> int:
        """All tokens, prompts and answers."""
        return sum(len(row.input_ids) for row in self.encoded)

    @property
    def answer_tokens(self) -> int:
        """Tokens that bear loss."""
        return sum(row.answer_tokens for row in self.encoded)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, named: str | None) -> None:
    """Make sure the tokenizer has a chat template: its own, or the named built-in one.

    The built-in `chatml` ends turns with `<|im_end|>` where the vocabulary has it as one token, else
    with the tokenizer's EOS, so that the end of a turn is always one token. Raises InputError.
    """
    if named == "chatml":
        end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
        if end is None:
            raise InputError("model: the tokenizer has no EOS token to end a turn with", "use another model")
        tokenizer.chat_template = CHATML.replace("END", str(end))
    if not tokenizer.chat_template:
        raise InputError(
            "model: its tokenizer has no chat template",
            "name a built-in one with --set model.chat_template=chatml, or use an instruct model",
        )


class Encoder:
    """Turns conversations into tokens with one tokenizer and its chat template.

    Loss falls on every assistant turn, up to and with its end-of-turn token, and on nothing else.
    Raises InputError when the template cannot be used at all.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        max_length: int | None = None,
        long_rows: str = "drop",
    ) -> None:
        if not tokenizer.is_fast:
            raise InputError("model: its tokenizer has no fast version", "use a model with a tokenizer.json")
        self.tokenizer = tokenizer
        self.system = system
        self.max_length = max_length
        self.long_rows = long_rows
        self.end_of_turn, self._template_ends_turns = self._find_end_of_turn()

    @property
    def end_ids(self) -> list[int]:
        """Token ids that end an answer: the template's end of turn and the tokenizer's EOS."""
        ids = [self._token_id(self.end_of_turn), self.tokenizer.eos_token_id]
        return sorted({int(i) for i in ids if i is not None})

    def prompt_ids(self, row: Row) -> list[int]:
        """The tokens a model is given to answer the row's first user turn."""
        text = self._render(self._with_system(row.prompt), generate=True)
        return list(self._tokenize(text)["input_ids"])

    def prompt(self, row: Row) -> list[int] | str:
        """The prompt's tokens, or the reason why it cannot be asked: the template refuses it, or it is too long."""
        try:
            ids = self.prompt_ids(row)
        except _TemplateRefused as refused:
            return str(refused)
        return ids if self.max_length is None or len(ids) < self.max_length else "longer than max_length"

    def encode(self, row: Row) -> EncodedRow | str:
        """The row's tokens, or the reason why it cannot train.

        A row longer than `max_length` loses its last turns; if its first exchange alone is too long it
        is dropped, or with `long_rows="cut"` its answer is cut where the limit falls.
        """
        messages = self._with_system(row.messages)
        try:
            text, spans = self._text_and_answers(messages)
        except _TemplateRefused as refused:
            return str(refused)
        tokens = self._tokenize(text, offsets=True)
        ids: list[int] = tokens["input_ids"]
        labels = _labels(ids, tokens["offset_mapping"], spans)
        limit = self.max_length
        if limit is not None and len(ids) > limit:
            fitting = [end for end in _answer_ends(labels) if end <= limit]
            if fitting:
                limit = fitting[-1]
            elif self.long_rows == "drop":
                return "longer than max_length"
            ids, labels = ids[:limit], labels[:limit]
        if all(label == IGNORED for label in labels):
            return "longer than max_length" if limit is not None else "no answer token"
        return EncodedRow(ids, labels)

    def encode_all(self, rows: Iterable[Row], progress: Callable[[int], None] | None = None) -> EncodedSet:
        """Encode rows; those that cannot train are counted by reason. `progress` hears of each row done."""
        kept: list[tuple[Row, EncodedRow]] = []
        left_out: Counter[str] = Counter()
        for done, row in enumerate(rows, start=1):
            encoded = self.encode(row)
            if progress is not None:
                progress(done)
            if isinstance(encoded, str):
                left_out[encoded] += 1
            else:
                kept.append((row, encoded))
        return EncodedSet(tuple(r for r, _ in kept), tuple(e for _, e in kept), dict(left_out))

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.system and not any(m.role == "system" for m in messages):
            return [Message("system", self.system), *messages]
        return list(messages)

    def _render(self, messages: Sequence[Message], generate: bool = False) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)
        except (
            Exception
        ) as error:  # a template may raise anything; Jinja's own errors share no base with its raise_exception
            raise _TemplateRefused(f"the chat template refuses it: {str(error).splitlines()[0][:80]}") from None
        return str(text)

    def _text_and_answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation and the character span of each answer with its end of turn."""
        text = ""
        spans = []
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._render(messages[:i], generate=True)
            after = self._render(messages[: i + 1])
            if not before.startswith(text) or not after.startswith(before):
                raise _TemplateRefused("the chat template changes earlier turns")
            end = after.rfind(self.end_of_turn, len(before)) if self._template_ends_turns else -1
            text = after[: end + len(self.end_of_turn)] if end >= 0 else after.rstrip("\n") + self.end_of_turn
            spans.append((len(before), len(text)))
        return text, spans

    def _find_end_of_turn(self) -> tuple[str, bool]:
        """The token that ends an assistant turn, and whether the template writes it itself."""
        probe = "qcftprobe"
        try:
            text = self._render([Message("user", probe), Message("assistant", probe)])
        except _TemplateRefused as refused:
            raise InputError(f"model: {refused}", "check the chat template") from None
        after = text[text.rfind(probe) + len(probe) :]
        special = self.tokenizer.all_special_tokens + [str(t) for t in self.tokenizer.get_added_vocab()]
        found = [(after.find(token), -len(token), token) for token in special if token and token in after]
        if found:
            return min(found)[2], True
        if self.tokenizer.eos_token is None:
            raise InputError("model: neither template nor tokenizer has a token that ends a turn", "use another model")
        return str(self.tokenizer.eos_token), False

    def _token_id(self, token: str) -> int | None:
        found = self.tokenizer.convert_tokens_to_ids(token)
        return found if isinstance(found, int) else None

    def _tokenize(self, text: str, offsets: bool = False) -> dict[str, Any]:
        return dict(self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=offsets))


class _TemplateRefused(ValueError):
    """The chat template cannot render a conversation; the text is the reason."""


def _labels(ids: list[int], offsets: Sequence[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """Label the tokens that lie within an answer, one that begins just before it (a blank) among them."""
    labels = []
    span = 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        while span < len(spans) and start >= spans[span][1]:
            span += 1
        inside = span < len(spans) and end > max(start, spans[span][0])
        labels.append(token if inside else IGNORED)
    return labels


def _answer_ends(labels: list[int]) -> list[int]:
    """Positions just after the last token of each answer."""
    return [
        i + 1
        for i, label in enumerate(labels)
        if label != IGNORED and (i + 1 == len(labels) or labels[i + 1] == IGNORED)
    ]
