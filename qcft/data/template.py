"""A tokenizer's chat template: how it renders a conversation, and where the answers are in the rendered text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from qcft.data.render import Conversation, TemplateRefused, render_all
from qcft.data.rows import Message, Row
from qcft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Thinking = Literal["auto", "on", "off"]
SpecialTokens = Literal["plain", "allow"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + 'END' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOS = "{{ bos_token }}"

# Added before a template that writes today's date, so that it writes this date, which is the default in Llama's.
# transformers passes no functions to templates, so the date is formatted by Jinja itself.
FIXED_DATE = (
    "{% macro strftime_now(form) %}{{ form"
    "|replace('%-', '%')|replace('%Y', '2024')|replace('%y', '24')|replace('%m', '07')|replace('%B', 'July')"
    "|replace('%b', 'Jul')|replace('%d', '26')|replace('%A', 'Friday')|replace('%a', 'Fri')"
    "|replace('%H', '12')|replace('%I', '12')|replace('%M', '00')|replace('%S', '00')|replace('%p', 'PM')"
    " }}{% endmacro %}{{ '' }}"
)

# Marks around a control token in the text of a turn while it is rendered: characters that text cannot contain.
START, END = "\ufdd0", "\ufdd1"

USER, ANSWER, REASON, SYSTEM = "qcftuser", "qcftanswer", "qcftreason", "qcftsystem"  # texts to test templates with
CLOSE = "\n</think>\n\n"  # after `<think>`: no thoughts
OPENED = re.compile(r"<think>\s*$")
INLINE = re.compile(r"(?:\s*<think>)?(.*?)</think>\s*(.*)", re.DOTALL)

REASONING_DROPPED = "reasoning dropped: the chat template has no place for it"
REASONING_OFF = "reasoning dropped: thinking is off"
SYSTEM_MERGED = "system prompt moved to the first user turn: the chat template has no system turn"
NO_TEXT = "no answer after its reasoning"
REWRITES = "the chat template rewrites the answer"
CONTROL_TOKENS = "control tokens in the text encoded as plain text"


def set_chat_template(tokenizer: PreTrainedTokenizerBase, named: str | None) -> None:
    """Make sure the tokenizer has a chat template: its own, or the named built-in one; with a fixed date.

    The built-in `chatml` begins with BOS if the tokenizer prepends one to text, and ends turns with `<|im_end|>` if the
    vocabulary has it as one token, else with the tokenizer's EOS, which it must have: the end of a turn is always one
    token. Raises InputError.
    """
    if named == "chatml":
        end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else str(tokenizer.eos_token)
        tokenizer.chat_template = (BOS if prepends_bos(tokenizer) else "") + CHATML.replace("END", end)
    if not tokenizer.chat_template:
        raise InputError(
            "model: its tokenizer has no chat template",
            "name a built-in one with --set model.chat_template=chatml, or use an instruct model",
        )
    template: Any = tokenizer.chat_template  # or several by name
    if not all(isinstance(text, str) for text in (template.values() if isinstance(template, dict) else [template])):
        raise InputError(
            "model: its chat template is not text",
            "correct chat_template in tokenizer_config.json, or --set model.chat_template=chatml",
        )
    tokenizer.chat_template = _dated(template)


def unset_date(template: Any) -> Any:
    """A tokenizer's chat template, or templates by name, as they were before their date was fixed."""
    if isinstance(template, dict):
        return {name: unset_date(text) for name, text in template.items()}
    return template.removeprefix(FIXED_DATE)


def is_built_in(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template is the built-in `chatml`."""
    before, _, after = CHATML.partition("END")
    text = str(tokenizer.chat_template).removeprefix(BOS)
    return text.startswith(before) and text.endswith(after)


def _dated(template: Any) -> Any:
    if isinstance(template, dict):
        return {name: _dated(text) for name, text in template.items()}
    writes_date = "strftime_now" in template and not template.startswith(FIXED_DATE)
    return FIXED_DATE + template if writes_date else template


def prepends_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS before text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


@dataclass(frozen=True)
class Rendered:
    """A conversation as text with the spans [start, end) of its characters that have loss: answers and their ends."""

    text: str
    spans: tuple[tuple[int, int], ...]


class Template:
    """How a tokenizer's chat template renders conversations, found by rendering with and without each turn.

    With `special_tokens="plain"`, control tokens in the text of turns are marked with START and END.
    Raises InputError if the template cannot be used at all.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens: SpecialTokens = "plain") -> None:
        self.tokenizer = tokenizer
        self.special_tokens = special_tokens
        self._ahead: dict[tuple[tuple[Message, ...], bool, bool], str | TemplateRefused] = {}
        self._control: re.Pattern[str] | None = None
        self._switches: bool | None = None  # unknown yet: everything is passed to the template
        self._reasons: Literal["field", "opened", "inline"] | None = None
        user = Message("user", USER)
        try:
            self.end_of_turn, self._ends_turns = self._find_end_of_turn()
            self._switches = self._render([user], True, True) != self._render([user], True, False)
            self._reasons = self._find_reasoning(user)
            opening, whole = self._render([user], True), self._render([user, Message("assistant", ANSWER)])
            self._has_prompt = opening != self._render([user])
        except TemplateRefused as refused:
            raise InputError(f"model: {refused}", "check the chat template") from None
        if USER not in whole or ANSWER not in whole:
            raise InputError(
                "model: its chat template does not write the text of turns",
                "use a model for text; or name a built-in template with --set model.chat_template=chatml",
            )
        between = whole[len(opening) : whole.rfind(ANSWER)].strip() if whole.startswith(opening) else None
        self.thinks = bool(self._switches or self._reasons or (between and self._has_prompt))
        self._plain = between == "" and not self.thinks
        self._written = opening + whole
        self._control = self._control_tokens()
        self.takes_system = self._takes_system(user)
        self._keeps_turns = self._find_keeps_turns((user, Message("assistant", ANSWER)))

    @property
    def traits(self) -> tuple[str, ...]:
        """The special treatment that the template needs for any rows: part of the ids of steps."""
        text = str(self.tokenizer.get_chat_template())
        return tuple(
            name
            for name, is_so in (
                ("dated 2024-07-26", FIXED_DATE in text),
                ("bos", is_built_in(self.tokenizer) and text.startswith(BOS)),
                ("thinking", self.thinks),
                ("no generation prompt", not self._plain and not self._has_prompt),
            )
            if is_so
        )

    def reads_otherwise(self, rows: Iterable[Row], system: str | None) -> bool:
        """Whether any of the rows needs special treatment by the template: part of the digest of the rows."""
        if system and not self.takes_system:
            return True
        for row in rows:
            answers = sum(message.role == "assistant" for message in row.messages)
            if answers > 1 and not self._keeps_turns:
                return True
            for message in row.messages:
                if message.role == "system" and not self.takes_system:
                    return True
                if self._control and self._control.search(message.content):
                    return True
        return False

    def beyond(self, rows: int) -> list[str]:
        """The tokens that rows or answers can contain but that are outside an embedding of this many rows."""
        tokenizer = self.tokenizer
        used = {self.end_of_turn, tokenizer.eos_token, tokenizer.pad_token}
        return [
            token
            for token, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
            if number >= rows
            and (token in used or token in self._written or not (self._control and self._control.fullmatch(token)))
        ]

    def prepare(self, messages: Sequence[Message], thinking: Thinking) -> tuple[list[Message], Counter[str]]:
        """The conversation in the form that this template accepts, and what was changed: each reason once."""
        changed: Counter[str] = Counter()
        prepared = [self._with_reasoning(message, thinking, changed) for message in messages]
        if not self.takes_system and prepared and prepared[0].role == "system":
            prepared = _merged_system(prepared)
            changed[SYSTEM_MERGED] = 1
        if self._control and any(self._control.search(message.content) for message in prepared):
            changed[CONTROL_TOKENS] = 1
        return prepared, changed

    def sequences(self, messages: Sequence[Message], thinking: Thinking) -> list[Rendered]:
        """The conversation as texts to train on: one, or one for each answer if the template writes earlier turns
        differently once there are later ones, so that each answer is trained after the text that the model will see.

        Raises TemplateRefused.
        """
        done: list[Rendered] = []
        text = ""
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message.role != "assistant" or not message.train:
                continue
            prompt, answer = self._prompt_and_answer(messages[: i + 1], thinking)
            if spans and not prompt.startswith(text):
                done.append(Rendered(text, tuple(spans)))
                spans = []
            text = prompt + answer
            spans.append((len(prompt), len(text)))
        return [*done, Rendered(text, tuple(spans))] if spans else done

    def render_ahead(self, conversations: Iterable[Sequence[Message]], thinking: Thinking) -> None:
        """Render everything that `sequences` will need in one call, which is faster than one by one."""
        asked: dict[tuple[tuple[Message, ...], bool, bool], None] = {}
        for messages in conversations:
            for i, answer in enumerate(messages):
                if answer.role == "assistant" and answer.train:
                    before, think = tuple(messages[:i]), _thinks(answer, thinking)
                    asked |= {(before, True, think): None, ((*before, answer), False, think): None}
                    if self._takes_start(think) or not answer.finished:
                        asked[(*before, replace(answer, content=ANSWER)), False, think] = None
        known = [one for one in asked if one[0]]
        found = render_all(self.tokenizer, [self._conversation(*one) for one in known]) if known else []
        self._ahead = dict(zip(known, found, strict=True))

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that the model gets to answer, without thinking. Raises TemplateRefused."""
        if self._plain:
            return self._render(messages, True)
        return self._prompt_and_answer([*messages, Message("assistant", ANSWER)], "off")[0]

    def _prompt_and_answer(self, messages: Sequence[Message], thinking: Thinking) -> tuple[str, str]:
        """The text before the last turn's answer when the model generates it, and the answer with its end of turn, or
        up to the end of its text if it is not finished.

        Text that a template writes between its generation prompt and an answer without thoughts, such as an empty think
        block, is not part of the answer, unless thinking is on: then the model has to write it.
        """
        answer = messages[-1]
        think = _thinks(answer, thinking)
        opening, whole = self._render(messages[:-1], True, think), self._render(messages, False, think)
        if whole.startswith(opening):
            start = len(opening)
            if self._takes_start(think):
                at = self._content_start(messages, whole, think)
                start = at if whole[start:at].strip() else start
            return whole[:start], self._ended(messages, whole, start, think)
        rest = self._ended(messages, whole, self._content_start(messages, whole, think), think)
        if not OPENED.search(opening):
            return opening, rest
        if not think:
            return opening + CLOSE, rest
        thoughts = (answer.reasoning or "").strip("\n")
        return opening, (f"{thoughts}{CLOSE}" if thoughts else CLOSE) + rest

    def _takes_start(self, think: bool) -> bool:
        """Whether another rendering is needed to find where an answer begins."""
        return not self._plain and not (think and self._has_prompt)

    def _content_start(self, messages: Sequence[Message], whole: str, think: bool) -> int:
        """Where the last turn's text begins in the conversation as rendered."""
        tried = self._render([*messages[:-1], replace(messages[-1], content=ANSWER)], False, think)
        at = tried.rfind(ANSWER)
        if at < 0 or whole[:at] != tried[:at]:
            raise TemplateRefused(REWRITES)
        return at

    def _content_end(self, messages: Sequence[Message], whole: str, think: bool) -> int:
        """Where the last turn's text ends in the conversation as rendered."""
        tried = self._render([*messages[:-1], replace(messages[-1], content=ANSWER)], False, think)
        at = tried.rfind(ANSWER)
        after = tried[at + len(ANSWER) :]
        if at < 0 or not whole.endswith(after):
            raise TemplateRefused(REWRITES)
        return len(whole) - len(after)

    def _ended(self, messages: Sequence[Message], whole: str, start: int, think: bool) -> str:
        """The text from `start` to the end of its turn, which is added if the template writes none; for an unfinished
        answer, without the end."""
        if not messages[-1].finished:
            return whole[start : self._content_end(messages, whole, think)]
        end = whole.rfind(self.end_of_turn, start) if self._ends_turns else -1
        return whole[start : end + len(self.end_of_turn)] if end >= 0 else whole[start:].rstrip("\n") + self.end_of_turn

    def _with_reasoning(self, message: Message, thinking: Thinking, changed: Counter[str]) -> Message:
        """A turn with its reasoning separated from its text, if the template renders reasoning."""
        inline = INLINE.fullmatch(message.content) if self._reasons and message.role == "assistant" else None
        if inline and message.reasoning is None:
            message = replace(message, content=inline[2], reasoning=inline[1].strip("\n") or None)
        if message.reasoning is None:
            return message
        if not message.content.strip():
            raise TemplateRefused(NO_TEXT)
        if self._reasons and thinking != "off":
            return message
        changed[REASONING_OFF if self._reasons else REASONING_DROPPED] = 1
        return replace(message, reasoning=None)

    def _render(self, messages: Sequence[Message], generate: bool = False, think: bool = False) -> str:
        if not messages:
            raise TemplateRefused("the chat template is given no turns")
        asked = (tuple(messages), generate, think)
        found = self._ahead.get(asked) or render_all(self.tokenizer, [self._conversation(*asked)])[0]
        if isinstance(found, TemplateRefused):
            raise found
        return found

    def _conversation(self, messages: Sequence[Message], generate: bool, think: bool) -> Conversation:
        thinking = {"enable_thinking": think, "thinking": think} if self._switches is not False else {}
        return [self._turn(message) for message in messages], {"add_generation_prompt": generate, **thinking}

    def _turn(self, message: Message) -> dict[str, str]:
        content, reasoning = self.marked(message.content), message.reasoning
        if reasoning is None or self._reasons == "opened":
            return {"role": message.role, "content": content}
        reasoning = self.marked(reasoning)
        if self._reasons == "inline":
            return {"role": message.role, "content": f"<think>\n{reasoning}{CLOSE}{content}"}
        return {"role": message.role, "content": content, "reasoning_content": reasoning, "thinking": reasoning}

    def marked(self, text: str) -> str:
        """Text with marks around its control tokens, if they are to be plain text."""
        if self._control is None:
            return text
        if START in text or END in text:
            text = text.replace(START, "").replace(END, "")
        return self._control.sub(f"{START}\\g<0>{END}", text)

    def _find_end_of_turn(self) -> tuple[str, bool]:
        """The token that ends an assistant turn, and whether the template writes it itself."""
        text = self._render([Message("user", USER), Message("assistant", ANSWER)])
        after = text[text.rfind(ANSWER) + len(ANSWER) :]
        special = self.tokenizer.all_special_tokens + [str(t) for t in self.tokenizer.get_added_vocab()]
        found = [(after.find(token), -len(token), token) for token in special if token and token in after]
        if found:
            return min(found)[2], True
        if self.tokenizer.eos_token is None:
            raise InputError(
                "model: neither its chat template nor its tokenizer has a token that ends a turn", "use another model"
            )
        return str(self.tokenizer.eos_token), False

    def _find_reasoning(self, user: Message) -> Literal["field", "opened", "inline"] | None:
        """How a turn's thoughts are passed to the template: as a field, after a block that its generation prompt opens,
        in the text; None: not at all."""
        answer = Message("assistant", ANSWER, reasoning=REASON)
        if REASON in self._render([user, answer], False, True):
            return "field"
        if OPENED.search(self._render([user], True, True)):
            return "opened"
        if "</think>" in str(self.tokenizer.get_chat_template()):
            inline = Message("assistant", f"<think>\n{REASON}{CLOSE}{ANSWER}")
            if REASON in self._render([user, inline], False, True):
                return "inline"
        return None

    def _takes_system(self, user: Message) -> bool:
        try:
            return SYSTEM in self._render([Message("system", SYSTEM), user, Message("assistant", ANSWER)])
        except TemplateRefused:
            return False

    def _find_keeps_turns(self, turn: tuple[Message, Message]) -> bool:
        try:
            return len(self.sequences([*turn, *turn], "auto")) == 1
        except TemplateRefused:
            return False

    def _control_tokens(self) -> re.Pattern[str] | None:
        """A pattern for special tokens, and for added tokens that the template writes around turns."""
        if self.special_tokens == "allow":
            return None
        added = self.tokenizer.added_tokens_decoder.values()
        tokens = {t.content for t in added if t.special or t.content in self._written} | {
            *self.tokenizer.all_special_tokens
        }
        longest_first = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _thinks(answer: Message, thinking: Thinking) -> bool:
    return thinking == "on" or (thinking == "auto" and answer.reasoning is not None)


def _merged_system(messages: Sequence[Message]) -> list[Message]:
    """The conversation with its system turn's text at the start of the first user turn."""
    system, *rest = messages
    first = next(i for i, message in enumerate(rest) if message.role == "user")
    text = f"{system.content.strip()}\n\n{rest[first].content}"
    return [*rest[:first], replace(rest[first], content=text), *rest[first + 1 :]]
