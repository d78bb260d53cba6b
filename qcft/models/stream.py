"""One answer to one prompt, streamed in pieces of text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qcft.errors import QcftError
from qcft.models.generate import Answer, Nucleus, Sampling
from qcft.models.halving import attempt
from qcft.models.load import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HALF = "\ufffd"  # what a tokenizer writes for a character whose last bytes are in the next token


class _Stopped(Exception):
    """The caller wants no more text."""


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    end_ids: list[int],
    sampling: Sampling,
    on_text: Callable[[str], None],
    stopped: Callable[[], bool],
) -> Answer:
    """Answer a prompt (token ids). `on_text` is called with each piece of the answer's text; generation stops once
    `stopped()` is true, and the answer is unfinished then. Raises QcftError when memory runs out."""
    reader = _Reader(tokenizer, end_ids, on_text, stopped)

    def generate() -> bool:
        import torch

        ids = torch.tensor([prompt], device=model.device)
        options: Any = {"logits_processor": [Nucleus(sampling, [0])]} if sampling.temperature > 0 else {}
        with suppress(_Stopped):
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,  # the nucleus leaves one token to choose
                eos_token_id=end_ids,
                pad_token_id=end_ids[0],
                streamer=reader,
                **options,
            )
        return True

    with evaluating(model):
        if attempt(generate) is None:
            raise QcftError(
                f"memory ran out while answering a prompt of {len(prompt):,} tokens",
                "start a new conversation, lower --max-new-tokens, or free memory",
            )
    return reader.answer()


class _Reader:
    """A streamer of transformers: `put` is called with the prompt, then with each new token; `end` after the last."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: list[int],
        on_text: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> None:
        self.tokenizer, self.end_ids, self.on_text, self.stopped = tokenizer, end_ids, on_text, stopped
        self.tokens: list[int] = []
        self.passed_on = ""
        self._prompt_seen = self._ended = False

    def put(self, value: Any) -> None:
        """Receive a new token, and pass on the text that is complete by now."""
        if not self._prompt_seen:
            self._prompt_seen = True
        elif (token := int(value.reshape(-1)[0])) in self.end_ids:
            self._ended = True
        else:
            self.tokens.append(token)
            text = self._text()
            if not text.endswith(HALF):
                self._pass_on(text)
        if self.stopped():
            raise _Stopped

    def end(self) -> None:
        """Called after the last token."""

    def answer(self) -> Answer:
        """The whole answer, after passing on the rest of its text."""
        text = self._text()
        self._pass_on(text)
        return Answer(text, len(self.tokens), self._ended)

    def _pass_on(self, text: str) -> None:
        if len(text) > len(self.passed_on) and text.startswith(self.passed_on):
            self.on_text(text[len(self.passed_on) :])
            self.passed_on = text

    def _text(self) -> str:
        """The answer so far, stripped of white space like answers that are not streamed. Without clean-up, which would
        change text that was passed on already."""
        decoded = self.tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded).strip()
