"""From conversations and documents to tokens: the chat template, the trained tokens, the limit on length."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qcft.data.mix import in_groups
from qcft.data.render import TemplateRefused
from qcft.data.rows import Message, Row
from qcft.data.template import END, NO_TEXT, REWRITES, START, Template, Thinking, prepends_bos
from qcft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AT_ONCE, MUCH = 100, 1_000_000  # rows and characters rendered at once
IGNORED = -100  # the label of a token without loss
MARKED = re.compile(f"{START}([^{START}{END}]*){END}")
TOO_LONG, NO_ANSWER = "longer than max_length", "no answer to train"
TOO_SHORT = "shorter than train.text.min_tokens"
PIECES, NO_END = "cut into pieces of at most max_length", f"a last piece {TOO_SHORT} dropped"
SPLIT = "made into one training row for each answer: the chat template changes earlier turns"


@dataclass(frozen=True)
class EncodedRow:
    """Token ids and, of the same length, labels: the id for tokens with loss, else -100. `source`: where it is from;
    `name`: its name in tables; `cut`: whether it was truncated by the limit on length; `replay`: whether it is a replay
    row, not a new row of the phase that trains on it; `bytes`: for raw text that is measured, the UTF-8 bytes of its
    labels."""

    input_ids: list[int]
    labels: list[int]
    source: str = ""
    name: str = ""
    cut: bool = field(default=False, compare=False)
    replay: bool = field(default=False, compare=False)
    bytes: int = field(default=0, compare=False)

    @property
    def answer_tokens(self) -> int:
        """How many tokens have loss."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class EncodedSet:
    """Encoded rows, each with its original row; `left_out` counts dropped rows by reason, `changed` the rows that were
    changed while encoding."""

    rows: tuple[Row, ...]
    encoded: tuple[EncodedRow, ...]
    left_out: dict[str, int]
    changed: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """All tokens, prompts and answers."""
        return sum(len(row.input_ids) for row in self.encoded)

    @property
    def answer_tokens(self) -> int:
        """Tokens that have loss."""
        return sum(row.answer_tokens for row in self.encoded)


class Encoder:
    """Turns conversations into tokens with one tokenizer and its chat template (by default as `Template` reads it).

    Every assistant turn to be trained has loss, including its end-of-turn token, and nothing else has. An unfinished
    answer has loss up to the end of its text; a row that ends with it ends there.
    In a document of raw text every token but the first has loss, including its end; with `measuring`, every token of
    its text, except those of the first character if no BOS precedes it.
    Raises InputError if the template cannot be used at all.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        max_length: int | None = None,
        long_rows: str = "drop",
        thinking: Thinking = "auto",
        template: Template | None = None,
        min_tokens: int = 2,
        measuring: bool = False,
    ) -> None:
        if not tokenizer.is_fast:
            raise InputError("model: its tokenizer has no fast version", "use a model with a tokenizer.json")
        self.tokenizer = tokenizer
        self.template = template or Template(tokenizer)
        self.system = system
        self.max_length = max_length
        self.long_rows = long_rows
        self.thinking: Thinking = thinking
        self.min_tokens = min_tokens
        self.measuring = measuring

    @property
    def end_of_turn(self) -> str:
        """The token that ends an answer."""
        return self.template.end_of_turn

    @property
    def end_ids(self) -> list[int]:
        """Token ids that end an answer: the template's end of turn and the tokenizer's EOS."""
        ids = [self.tokenizer.convert_tokens_to_ids(self.end_of_turn), self.tokenizer.eos_token_id]
        return sorted({i for i in ids if isinstance(i, int)})

    def prompt_ids(self, row: Row) -> list[int]:
        """The tokens a model is given to answer the row's first user turn, without thinking."""
        messages, _ = self.template.prepare(self._with_system(row.prompt), "off")
        return self._tokenize(self.template.prompt(messages))[0]

    def prompt(self, row: Row) -> list[int] | str:
        """The prompt's tokens, or the reason why it cannot be used: the template refuses it, or it is too long."""
        try:
            ids = self.prompt_ids(row)
        except TemplateRefused as refused:
            return str(refused)
        return ids if self.max_length is None or len(ids) < self.max_length else TOO_LONG

    def encode(self, row: Row) -> tuple[EncodedRow, ...] | str:
        """The row's tokens, or the reason why it cannot be used for training.

        They are one training row, or one for each answer if the template writes earlier turns differently once there
        are later ones. A training row longer than `max_length` loses its last turns; if its first exchange alone is
        too long it is dropped, or with `long_rows="cut"` its answer is truncated. A longer document becomes several
        training rows.
        """
        if row.text is not None:
            return self._document(row.text, Counter())
        prepared = self._prepare(row)
        return prepared if isinstance(prepared, str) else self._encode(*prepared, Counter())

    def encode_all(self, rows: Iterable[Row], progress: Callable[[int], None] | None = None) -> EncodedSet:
        """Encode rows; those that cannot be used are counted by reason. `progress` is called with the rows done."""
        kept: list[tuple[Row, EncodedRow]] = []
        left_out: Counter[str] = Counter()
        changed: Counter[str] = Counter()
        done = 0
        for chunk in in_groups(rows, _rendered_size, MUCH, AT_ONCE):
            prepared = [self._prepare(row) if row.text is None else "" for row in chunk]
            self.template.render_ahead([one[0] for one in prepared if not isinstance(one, str)], self.thinking)
            for row, one in zip(chunk, prepared, strict=True):
                if row.text is not None:
                    encoded = self._document(row.text, changed)
                else:
                    encoded = one if isinstance(one, str) else self._encode(*one, changed)
                done += 1
                if progress is not None:
                    progress(done)
                if isinstance(encoded, str):
                    left_out[encoded] += 1
                else:
                    kept += [(row, training_row) for training_row in encoded]
        return EncodedSet(tuple(r for r, _ in kept), tuple(e for _, e in kept), dict(left_out), dict(+changed))

    def _prepare(self, row: Row) -> tuple[list[Message], Counter[str]] | str:
        try:
            return self.template.prepare(self._with_system(row.messages), self.thinking)
        except TemplateRefused as refused:
            return str(refused)

    def _encode(
        self, messages: list[Message], what: Counter[str], changed: Counter[str]
    ) -> tuple[EncodedRow, ...] | str:
        try:
            rendered = self.template.sequences(messages, self.thinking)
            encoded = [self._encode_text(one.text, one.spans) for one in rendered]
        except TemplateRefused as refused:
            return str(refused)
        kept = [one for one in encoded if one is not None]
        if not kept:
            return TOO_LONG if encoded else NO_ANSWER
        changed.update(what)
        if len(encoded) > 1:
            changed[SPLIT] += 1
        if len(kept) < len(encoded):
            kept[-1] = replace(kept[-1], cut=True)
        return tuple(kept)

    def _document(self, text: str, changed: Counter[str]) -> tuple[EncodedRow, ...] | str:
        """A document's tokens, after BOS if the tokenizer adds it, in pieces of at most `max_length`.

        A later piece begins with the last token of the one before, as context, so that each token has loss once. The
        bytes of a character of several tokens are counted with its first token.
        """
        marked = self.template.marked(text)
        ids, offsets = self._tokenize(marked)
        if prepends_bos(self.tokenizer):
            ids, offsets = [self.tokenizer.bos_token_id, *ids], [(0, 0), *offsets]
        first = 1
        if self.measuring:
            first = next((i for i, (start, _) in enumerate(offsets) if i and start >= offsets[0][1]), len(ids))
        elif self.tokenizer.eos_token_id is None:
            raise InputError("model: its tokenizer has no EOS token, to end a document", "use another model")
        else:
            ids, offsets = [*ids, self.tokenizer.eos_token_id], [*offsets, (len(marked), len(marked))]
        found: list[EncodedRow] = []
        for start, begin, end in _pieces(len(ids), first, self.max_length or len(ids)):
            if begin == end or not (self.measuring or end - start >= self.min_tokens):
                changed[NO_END] += bool(found)
                continue
            scored = marked[offsets[begin - 1][1] : offsets[end - 1][1] if end < len(ids) else None]
            size = len(scored.replace(START, "").replace(END, "").encode()) if self.measuring else 0
            found.append(EncodedRow(ids[start:end], [IGNORED] * (begin - start) + ids[begin:end], bytes=size))
        changed[PIECES] += len(found) > 1
        return tuple(found) or TOO_SHORT

    def _encode_text(self, text: str, spans: Sequence[tuple[int, int]]) -> EncodedRow | None:
        """Tokens and labels of a rendered conversation, within `max_length`; None if no answer fits."""
        ids, offsets = self._tokenize(text)
        labels = _labels(ids, offsets, spans)
        limit, cut = self.max_length, False
        if limit is not None and len(ids) > limit:
            cut = True
            fitting = [end for end in _answer_ends(labels) if end <= limit]
            if not fitting and self.long_rows == "drop":
                return None
            limit = fitting[-1] if fitting else limit
            ids, labels = ids[:limit], labels[:limit]
        return None if all(label == IGNORED for label in labels) else EncodedRow(ids, labels, cut=cut)

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.system and not any(m.role == "system" for m in messages):
            return [Message("system", self.system), *messages]
        return list(messages)

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and, for each, its characters [start, end); marked control tokens become plain text."""
        if START not in text:
            return self._tokens(text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        end = 0
        for marked in [*MARKED.finditer(text), None]:
            piece = text[end : marked.start() if marked else len(text)]
            if START in piece or END in piece:
                raise TemplateRefused("the chat template splits a control token in the text of a turn")
            new, places = self._tokens(piece) if end == 0 else self._tokens_after(piece)
            ids += new
            offsets += [(end + a, end + b) for a, b in places]
            if marked:
                end = marked.end()
                new = self._plain_ids(marked[1])
                ids += new
                offsets += [marked.span()] * len(new)
        return ids, offsets

    def _tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(tokens["input_ids"]), list(tokens["offset_mapping"])

    def _tokens_after(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of text that follows other text: a tokenizer may add a space before the first text."""
        head = self._tokens("\n")[0]
        ids, offsets = self._tokens("\n" + text)
        if ids[: len(head)] != head:
            return self._tokens(text)
        return ids[len(head) :], [(max(0, a - 1), b - 1) for a, b in offsets[len(head) :]]

    def _plain_ids(self, token: str) -> list[int]:
        """A control token's characters as the tokenizer encodes them without its added tokens."""
        backend = self.tokenizer.backend_tokenizer

        def encode(text: str) -> list[int]:
            text = backend.normalizer.normalize_str(text) if backend.normalizer else text
            pieces = [p for p, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
            return [one.id for piece in pieces for one in backend.model.tokenize(piece)]

        head = encode("\n")
        ids = encode("\n" + token)
        ids = ids[len(head) :] if ids[: len(head)] == head else encode(token)
        if self.tokenizer.convert_tokens_to_ids(token) in ids:  # it is one entry of the model's vocabulary
            return [one for character in token for one in encode(character)]
        return ids


def _pieces(tokens: int, first: int, most: int) -> Iterator[tuple[int, int, int]]:
    """A document's tokens in pieces [start, end) of at most `most`, which have loss from `begin`: (start, begin, end).
    Together they cover the tokens from `first`, each once."""
    start = end = 0
    while end < tokens:
        start, end = max(0, end - 1), min(max(0, end - 1) + most, tokens)
        yield start, min(max(first, start + 1), end), end


def _rendered_size(row: Row) -> int:
    """Roughly how many characters are rendered for a row: each of its turns with those before."""
    return len(row.messages) * sum(len(message.content) for message in row.messages)


def hint_for(left_out: Mapping[str, int], when_too_long: str) -> str:
    """The hint if no row is left: what to do about the most frequent reason."""
    reason = max(left_out, key=lambda one: left_out[one]) if left_out else ""
    if reason == TOO_LONG:
        return when_too_long
    if reason == TOO_SHORT:
        return "give longer documents, or lower train.text.min_tokens"
    if reason == NO_ANSWER:
        return "give rows with an answer to train on: not every assistant turn with train: false or weight: 0"
    if reason == NO_TEXT:
        return "give an answer after the reasoning, or keep thinking: auto and remove the reasoning"
    if reason == REWRITES:
        return "use the model's own chat template; this one changes the text of answers"
    return "check the order of roles in the rows: most templates need user and assistant in turn"


def _labels(ids: list[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Label the tokens inside an answer, including one that begins just before it (with a space)."""
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
