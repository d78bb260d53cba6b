"""Tokens and labels: loss on answers and their end of turn, nothing else; limits on length."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcft import InputError
from qcft.data.encode import IGNORED, Encoder
from qcft.data.rows import Message, Row
from qcft.data.template import set_chat_template


def row(*turns, id=None):
    messages = [Message(role, text) for role, text in turns]
    first = next(i for i, m in enumerate(messages) if m.role == "assistant")
    return Row(tuple(messages[:first]), tuple(messages[first:]), id)


def only(encoded):
    """The one training row that a row became."""
    assert len(encoded) == 1, encoded
    return encoded[0]


def trained_text(tokenizer, encoded):
    return tokenizer.decode([label for label in encoded.labels if label != IGNORED])


def test_loss_falls_on_the_answer_and_its_end_of_turn(tokenizer):
    encoded = only(Encoder(tokenizer).encode(row(("user", "the cat"), ("assistant", "a red dog"))))
    assert trained_text(tokenizer, encoded) == "a red dog<|im_end|>"
    text = tokenizer.decode(encoded.input_ids)
    assert text == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\na red dog<|im_end|>"


def test_every_assistant_turn_is_trained(tokenizer):
    turns = [("user", "the cat"), ("assistant", "red"), ("user", "the dog"), ("assistant", "blue")]
    encoded = only(Encoder(tokenizer).encode(row(*turns)))
    assert trained_text(tokenizer, encoded) == "red<|im_end|>blue<|im_end|>"


def test_the_prompt_is_what_generation_is_given(tokenizer):
    encoder = Encoder(tokenizer, system="the bird")
    one = row(("user", "the cat"), ("assistant", "red"))
    encoded, prompt = only(encoder.encode(one)), encoder.prompt_ids(one)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert all(label == IGNORED for label in encoded.labels[: len(prompt)])
    assert encoded.labels[len(prompt)] != IGNORED


def test_the_rows_own_system_prompt_wins(tokenizer):
    encoder = Encoder(tokenizer, system="from recipe")
    with_own = only(encoder.encode(row(("system", "own"), ("user", "a"), ("assistant", "b"))))
    without = only(encoder.encode(row(("user", "a"), ("assistant", "b"))))
    assert "own" in tokenizer.decode(with_own.input_ids)
    assert "from recipe" not in tokenizer.decode(with_own.input_ids)
    assert "from recipe" in tokenizer.decode(without.input_ids)


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=30))
def test_any_answer_comes_back_whole(tokenizer, text):
    """Characters of several tokens, blanks and newlines at the ends: the labels decode to the answer."""
    encoded = only(Encoder(tokenizer).encode(row(("user", "q"), ("assistant", text))))
    assert trained_text(tokenizer, encoded) == tokenizer.decode(
        tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    )


def test_too_long_rows_lose_turns_then_drop_or_cut(tokenizer):
    turns = [("user", "the cat"), ("assistant", "red"), ("user", "the dog"), ("assistant", "blue " * 50)]
    full = only(Encoder(tokenizer).encode(row(*turns[:2])))
    limit = len(full.input_ids) + 5
    shortened = only(Encoder(tokenizer, max_length=limit).encode(row(*turns)))
    assert shortened == full
    assert (shortened.cut, full.cut) == (True, False)
    long = row(("user", "the cat"), ("assistant", "blue " * 50))
    assert Encoder(tokenizer, max_length=limit).encode(long) == "longer than max_length"
    cut = only(Encoder(tokenizer, max_length=limit, long_rows="cut").encode(long))
    assert len(cut.input_ids) == limit
    prompt_too_long = row(("user", "the cat " * 50), ("assistant", "red"))
    assert Encoder(tokenizer, max_length=limit, long_rows="cut").encode(prompt_too_long) == "longer than max_length"


def test_a_template_without_end_of_turn_gets_eos(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoded = only(Encoder(tokenizer).encode(row(("user", "a"), ("assistant", "b"))))
    # The blank that ends the prompt is one token with the answer's first letters: it is trained with them.
    assert trained_text(tokenizer, encoded).lstrip() == "b<|im_end|>"


def test_no_chat_template_is_an_error_that_names_the_built_in_one(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template") as error:
        set_chat_template(tokenizer, None)
    assert "chatml" in error.value.hint
    set_chat_template(tokenizer, "chatml")
    encoded = only(Encoder(tokenizer).encode(row(("user", "a"), ("assistant", "b"))))
    assert trained_text(tokenizer, encoded) == "b<|im_end|>"


def test_a_row_the_template_refuses_is_counted(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 's' %}{{ raise_exception('no s today') }}{% endif %}" + tokenizer.chat_template
    )
    rows = [row(("user", "s"), ("assistant", "b")), row(("user", "a"), ("assistant", "b"))]
    encoded = Encoder(tokenizer).encode_all(rows)
    assert len(encoded.rows) == 1
    assert list(encoded.left_out) == ["the chat template refuses it: no s today"]
