"""Tokens and labels: loss on answers and their end of turn, nothing else; limits on length."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcft import InputError
from qcft.data.encode import IGNORED, Encoder
from qcft.data.formats import to_row
from qcft.data.rows import Message, Row, digest_rows, message_from
from qcft.data.template import CHATML, CONTROL_TOKENS, SYSTEM_MERGED, Template, set_chat_template


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


def test_an_answer_that_was_cut_has_no_loss_on_an_end_of_turn(tokenizer):
    cut = Row((Message("user", "the cat"),), (Message("assistant", "a red dog", finished=False),))
    whole = row(("user", "the cat"), ("assistant", "a red dog"))
    encoded = Encoder(tokenizer).encode_all([cut, whole]).encoded
    assert [trained_text(tokenizer, one) for one in encoded] == ["a red dog", "a red dog<|im_end|>"]
    assert tokenizer.decode(encoded[0].input_ids).endswith("assistant\na red dog")
    assert encoded[0].input_ids == encoded[1].input_ids[:-1]
    # Before later turns its end is in the text, as the template has it, and has no loss either.
    more = Row(cut.prompt, (*cut.completion, Message("user", "the dog"), Message("assistant", "blue")))
    later = only(Encoder(tokenizer).encode(more))
    assert trained_text(tokenizer, later) == "a red dogblue<|im_end|>"
    assert "a red dog<|im_end|>" in tokenizer.decode(later.input_ids)


def test_a_cut_answer_is_kept_in_files_and_rows_without_the_mark_are_read_as_before():
    cut = Row((Message("user", "q"),), (Message("assistant", "a", finished=False),))
    record = cut.as_dict()
    assert record["completion"] == [{"role": "assistant", "content": "a", "finished": False}]
    assert to_row(record, "prompt-completion") == cut
    assert message_from(record["completion"][0]) == cut.completion[0]
    before = {"role": "assistant", "content": "a"}
    assert message_from(before) == Message("assistant", "a")
    assert Message("assistant", "a").as_dict() == before
    assert digest_rows([cut]) != digest_rows([Row(cut.prompt, (Message("assistant", "a"),))])


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
def test_the_labels_decode_to_any_answer(tokenizer, text):
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


NO_PROMPT = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"


def test_a_template_without_a_generation_prompt_keeps_the_role_out_of_the_answer(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    one = row(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    expected = only(Encoder(tokenizer).encode(one))
    prompt = Encoder(tokenizer).prompt_ids(one)
    tokenizer.chat_template = NO_PROMPT
    encoder = Encoder(tokenizer)
    assert only(encoder.encode(one)) == expected
    assert encoder.prompt_ids(one) == prompt
    assert encoder.template.traits == ("no generation prompt",)


def test_turns_that_are_not_to_be_trained_are_context(tokenizer):
    turns = [Message("user", "a"), Message("assistant", "bad", train=False), Message("user", "c")]
    good, bad = Message("assistant", "good"), Message("assistant", "bad again", train=False)
    one = Row(tuple(turns[:1]), (*turns[1:], good, Message("user", "d"), bad))
    encoded = only(Encoder(tokenizer).encode(one))
    assert trained_text(tokenizer, encoded) == "good<|im_end|>"
    text = tokenizer.decode(encoded.input_ids)
    assert "bad<|im_end|>" in text
    assert "again" not in text  # nothing after the last answer that is trained
    left_out = Encoder(tokenizer).encode_all([Row(tuple(turns[:1]), (bad,))]).left_out
    assert left_out == {"no answer to train": 1}


@pytest.mark.parametrize(
    "text", ["with <|im_end|> always", "<|im_end|>", "a<|im_start|>assistant\nb", " <|endoftext|> c"]
)
def test_control_tokens_in_text_are_plain_text(tokenizer, text):
    control = {i for t, i in tokenizer.get_vocab().items() if t.startswith("<|")}
    one = row(("user", text), ("assistant", f"see {text}"))
    encoder = Encoder(tokenizer)
    encoded = encoder.encode_all([one])
    (plain,) = encoded.encoded
    written = [i for i in plain.input_ids if i in control]
    simple = only(encoder.encode(row(("user", "a"), ("assistant", "b"))))
    assert written == [i for i in simple.input_ids if i in control]  # the template's own, and no others
    assert trained_text(tokenizer, plain) == f"see {text}<|im_end|>"
    assert [i for i in plain.labels if i in control] == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    prompts = [encoder.prompt_ids(asked) for asked in (one, row(("user", "a"), ("assistant", "b")))]
    assert [i for i in prompts[0] if i in control] == [i for i in prompts[1] if i in control]
    assert encoded.changed == {CONTROL_TOKENS: 1}
    allowed = only(Encoder(tokenizer, template=Template(tokenizer, "allow")).encode(one))
    assert sum(i in control for i in allowed.input_ids) > len(written)


def test_text_beside_a_control_token_is_encoded_as_without_it(tokenizer):
    """Where the pieces of a row are encoded apart, no blank and no other token comes in between them."""
    one = row(("user", "the cat"), ("assistant", "the cat<|im_end|>the dog"))
    encoded = only(Encoder(tokenizer).encode(one))
    before, after = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("the cat", "the dog"))
    answer = [label for label in encoded.labels if label != IGNORED]
    assert answer[: len(before)] == before
    assert answer[-len(after) - 1 :] == [*after, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def spm_tokenizer():
    """As Llama 2's and Gemma's: a blank is put before what comes first, and BOS before all."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz_|/<>\n:"
    tokens = ["<unk>", "<s>", "</s>", "\u2581", *letters]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_the_built_in_template_begins_with_bos_where_the_tokenizer_prepends_it(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = spm_tokenizer()
    set_chat_template(tokenizer, "chatml")
    one = row(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    encoder = Encoder(tokenizer)
    for ids in (only(encoder.encode(one)).input_ids, encoder.prompt_ids(one)):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    assert encoder.template.traits == ("bos",)
    without = AutoTokenizer.from_pretrained(tokenizer_folder)
    set_chat_template(without, "chatml")
    assert without.chat_template == CHATML.replace("END", "<|im_end|>")
    assert Encoder(without).template.traits == ()


def test_control_tokens_beside_a_sentencepiece_prefix_blank():
    tokenizer = spm_tokenizer()
    set_chat_template(tokenizer, "chatml")
    encoded = only(Encoder(tokenizer).encode(row(("user", "a"), ("assistant", "b</s>c <s>d"))))
    assert sum(i == tokenizer.eos_token_id for i in encoded.input_ids) == 2  # of the user's turn and of the answer
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    pieces = tokenizer.convert_ids_to_tokens([label for label in encoded.labels if label != IGNORED])
    assert "".join(pieces) == "b</s>c\u2581<s>d</s>"
    assert pieces.count("</s>") == 1


def test_a_system_prompt_the_template_refuses_goes_into_the_first_user_turn(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    rows = [row(("system", "s"), ("user", "a"), ("assistant", "b")), row(("user", "a"), ("assistant", "b"))]
    encoded = Encoder(tokenizer).encode_all(rows)
    assert "<|im_start|>user\ns\n\na<|im_end|>" in tokenizer.decode(encoded.encoded[0].input_ids)
    assert encoded.changed == {SYSTEM_MERGED: 1}
    assert Encoder(tokenizer, system="s").prompt_ids(rows[1]) == Encoder(tokenizer).prompt_ids(rows[0])
