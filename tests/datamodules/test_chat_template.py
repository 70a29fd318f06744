"""Masks by chat template: literal conversations in, literal masks out."""

import pytest

from lightning_peft.datamodules.chat_template import (
    as_messages,
    has_generation_marks,
    tokenize_messages,
    tokenize_prompt_completion,
    tokenize_text,
)
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def learnt(tokenizer, tokens):
    """The learnt stretches as texts, and the labels checked to be the ids themselves."""
    stretches, inside = [], False
    for token, label in zip(tokens["input_ids"], tokens["labels"], strict=True):
        assert label in (token, -100)
        if label == -100:
            inside = False
            continue
        if not inside:
            stretches.append([])
        stretches[-1].append(tokenizer.convert_ids_to_tokens(token))
        inside = True
    return [" ".join(stretch) for stretch in stretches]


TALK = [user("a b"), assistant("yes"), user("yes"), assistant("yes \n no")]

PLAIN = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} \n {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"  # noqa: E501
MARKED = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} \n {% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }} INSIDE{% endgeneration %} OUTSIDE{% else %}{{ m['content'] }} <|im_end|> {% endif %}\n "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant \n {% endif %}"
)


def test_chatml_without_marks():
    tokenizer = tiny_tokenizer()
    tokens = tokenize_messages(tokenizer, TALK)
    text = "<|im_start|> user \n a b <|im_end|> \n <|im_start|> assistant \n yes <|im_end|> \n "
    text += "<|im_start|> user \n yes <|im_end|> \n <|im_start|> assistant \n yes \n no <|im_end|> \n "
    assert tokenizer.convert_ids_to_tokens(tokens["input_ids"]) == text.strip(" ").split(" ")
    # The user's "yes" and the first answer are the same text as the last answer's beginning.
    assert learnt(tokenizer, tokens) == ["yes <|im_end|>", "yes \n no <|im_end|>"]


def test_repeated_assistant_texts_are_learnt_each_in_its_place():
    tokenizer = tiny_tokenizer()
    talk = [user("a"), assistant("yes"), user("a"), assistant("yes"), user("a"), assistant("yes")]
    tokens = tokenize_messages(tokenizer, talk)
    places = [i for i, label in enumerate(tokens["labels"]) if label != -100]
    assert learnt(tokenizer, tokens) == ["yes <|im_end|>"] * 3
    assert places == [9, 10, 21, 22, 33, 34]


def test_template_without_an_end_of_turn_token_learns_all_of_the_turn():
    tokenizer = tiny_tokenizer(PLAIN)
    assert learnt(tokenizer, tokenize_messages(tokenizer, TALK)) == ["yes \n", "yes \n no \n"]


def test_two_assistant_turns_in_a_row_and_a_system_turn():
    tokenizer = tiny_tokenizer()
    talk = [{"role": "system", "content": "good"}, user("a"), assistant("b"), assistant("c")]
    assert learnt(tokenizer, tokenize_messages(tokenizer, talk)) == ["b <|im_end|>", "c <|im_end|>"]


@pytest.mark.parametrize(
    ("end", "expected"),
    [("<|im_end|>", ["yes <|im_end|>", "yes \n no <|im_end|>"]), ("good", ["yes", "yes \n no"])],
)
def test_marks_are_obeyed_and_the_end_of_turn_token_behind_them_is_added(end, expected):
    tokenizer = tiny_tokenizer(MARKED.replace(" INSIDE", "").replace("OUTSIDE", end))
    assert has_generation_marks(tokenizer.chat_template)
    assert learnt(tokenizer, tokenize_messages(tokenizer, TALK)) == expected


def test_marks_that_hold_the_end_of_turn_token():
    tokenizer = tiny_tokenizer(MARKED.replace("INSIDE", "<|im_end|>").replace("OUTSIDE", ""))
    expected = ["yes <|im_end|>", "yes \n no <|im_end|>"]
    assert learnt(tokenizer, tokenize_messages(tokenizer, TALK)) == expected


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED.replace("INSIDE", "<|im_end|>").replace("OUTSIDE", "")])
def test_first_turn_masks_what_stands_before(template):
    tokenizer = tiny_tokenizer(template)
    assert learnt(tokenizer, tokenize_messages(tokenizer, TALK, first_turn=3)) == ["yes \n no <|im_end|>"]


def test_everything_learnt():
    tokenizer = tiny_tokenizer()
    tokens = tokenize_messages(tokenizer, TALK, assistant_only=False)
    assert tokens["labels"] == tokens["input_ids"]
    tokens = tokenize_messages(tokenizer, TALK, assistant_only=False, first_turn=3)
    assert learnt(tokenizer, tokens) == ["yes \n no <|im_end|> \n"]


def test_pad_equal_to_eos_keeps_every_end_of_turn():
    tokenizer = tiny_tokenizer(pad_token="<|im_end|>")
    assert learnt(tokenizer, tokenize_messages(tokenizer, TALK)) == ["yes <|im_end|>", "yes \n no <|im_end|>"]


def test_template_arguments_and_another_template():
    tokenizer = tiny_tokenizer(None)
    tokens = tokenize_messages(tokenizer, TALK, chat_template=CHAT_TEMPLATE.replace("user", "{{ name }}"), name="dog")
    assert learnt(tokenizer, tokens) == ["yes <|im_end|>", "yes \n no <|im_end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # Only the last turn keeps its text, as with thinking that is taken out of the history.
        (CHAT_TEMPLATE.replace("message['content']", "message['content'] if loop.last else 'x'"), "differ at 'a b"),
        (CHAT_TEMPLATE.replace("<|im_start|> assistant \n {%", "<|im_start|> bot {%"), "generation prompt"),
        (CHAT_TEMPLATE + "{% if messages | length < 4 %}{{ raise_exception('too short') }}{% endif %}", "too short"),
    ],
)
def test_template_that_cannot_be_masked(template, message):
    tokenizer = tiny_tokenizer(template)
    with pytest.raises(ValueError, match=message) as caught:
        tokenize_messages(tokenizer, TALK)
    assert "cannot be masked" in str(caught.value)
    assert "{% generation %}" in str(caught.value)
    tokenize_messages(tokenizer, TALK, assistant_only=False)  # the way out that it names


def test_no_template():
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_messages(tiny_tokenizer(None), TALK)


def test_prompt_and_completion():
    tokenizer = tiny_tokenizer()
    tokens = tokenize_prompt_completion(tokenizer, "a b ", "yes no")
    assert tokenizer.convert_ids_to_tokens(tokens["input_ids"]) == ["a", "b", "yes", "no", "<|im_end|>"]
    assert learnt(tokenizer, tokens) == ["yes no <|im_end|>"]
    assert learnt(tokenizer, tokenize_prompt_completion(tokenizer, "a b ", "yes", False)) == ["a b yes <|im_end|>"]
    assert learnt(tokenizer, tokenize_prompt_completion(tokenizer, "a ", "yes <|im_end|>")) == ["yes <|im_end|>"]
    assert learnt(tokenizer, tokenize_prompt_completion(tokenizer, "a", "")) == ["<|im_end|>"]


def test_a_token_across_the_border_belongs_to_the_completion():
    tokenizer = tiny_tokenizer()
    assert learnt(tokenizer, tokenize_prompt_completion(tokenizer, "a ye", "s no")) == ["yes no <|im_end|>"]


def test_special_tokens_that_the_tokenizer_adds():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 3), ("<|im_end|>", 4)]
    )
    tokens = tokenize_prompt_completion(tokenizer, "a ", "yes")
    assert tokenizer.convert_ids_to_tokens(tokens["input_ids"]) == ["<|im_start|>", "a", "yes", "<|im_end|>"]
    assert learnt(tokenizer, tokens) == ["yes <|im_end|>"]
    # A template writes its own.
    assert tokenize_messages(tokenizer, TALK) == tokenize_messages(tiny_tokenizer(), TALK)


def test_text():
    tokenizer = tiny_tokenizer()
    assert learnt(tokenizer, tokenize_text(tokenizer, "the cat sat")) == ["the cat sat <|im_end|>"]


class Slow:
    """A tokenizer that does not tell characters."""

    is_fast = False

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, text, add_special_tokens=True):
        return self.inner(text, add_special_tokens=add_special_tokens)


def test_slow_tokenizers():
    fast = tiny_tokenizer()
    slow = Slow(fast)
    assert tokenize_messages(slow, TALK) == tokenize_messages(fast, TALK)
    assert tokenize_prompt_completion(slow, "a b ", "yes") == tokenize_prompt_completion(fast, "a b ", "yes")
    with pytest.raises(ValueError, match="fast version"):
        tokenize_prompt_completion(slow, "a ye", "s")


def test_as_messages():
    assert as_messages([{"role": "user", "content": "a", "name": None}]) == [user("a")]
    assert as_messages([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]) == [user("a"), assistant("b")]
    with pytest.raises(ValueError, match="'role' and 'content'"):
        as_messages([{"speaker": "x"}])
