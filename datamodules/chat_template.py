"""From rows to token ids and labels: messages, prompt and completion, plain text. Pure functions on one row.

Labels are -100 where nothing is to be learnt and the token's own id elsewhere; they are not shifted.
"""

from __future__ import annotations

import bisect
import itertools
import re
from typing import Any

IGNORED = -100
Messages = list[dict[str, Any]]
Tokens = dict[str, list[int]]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WAY_OUT = (
    "Give chat_template= a version with {% generation %} and {% endgeneration %} around the assistant's text, keep "
    "rows with a single assistant turn, or set assistant_only_loss=False."
)


def has_generation_marks(chat_template: str | None) -> bool:
    """Whether the template itself says which text is the assistant's.

    >>> has_generation_marks("{% generation %}{{ m.content }}{% endgeneration %}")
    True
    """
    return bool(_MARKS.search(chat_template or ""))


def as_messages(turns: list[dict[str, Any]]) -> Messages:
    """Turns with `role` and `content`, also from ShareGPT's `from` and `value`; columns that are None left out.

    >>> as_messages([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'}]
    """
    roles = {"human": "user", "gpt": "assistant", "bot": "assistant"}
    out = []
    for turn in turns:
        turn = {key: value for key, value in turn.items() if value is not None}
        if "from" in turn:
            turn = {"role": roles.get(turn["from"], turn["from"]), "content": turn.get("value", "")}
        if "role" not in turn:
            raise ValueError(f"a message has the keys {sorted(turn)}: it needs 'role' and 'content'.")
        out.append(turn)
    return out


def tokenize_text(tokenizer: Any, text: str) -> Tokens:
    """The whole text learnt, with an end-of-text token behind it."""
    ids, _ = _encoded(tokenizer, text, special=True)
    ids = _ended(tokenizer, ids)
    return {"input_ids": ids, "labels": list(ids)}


def tokenize_prompt_completion(tokenizer: Any, prompt: str, completion: str, completion_only: bool = True) -> Tokens:
    """Prompt and completion as one text, with an end-of-text token behind it; the completion and that token learnt.

    A token that holds the prompt's last characters and the completion's first belongs to the completion.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: What is given.
        completion: What is learnt; nothing is put between the two.
        completion_only: Learn the completion only, rather than both.
    """
    border = len(prompt) if completion_only else -1
    ids, ends = _encoded(tokenizer, prompt + completion, [len(prompt)], special=True)
    # Special tokens put in front by the tokenizer end at character 0.
    labels = [token if end > border else IGNORED for token, end in zip(ids, ends)]
    if ids and ids[-1] == tokenizer.eos_token_id:
        labels[-1] = ids[-1]  # put there by the tokenizer, and it, too, ends at character 0
    ended = _ended(tokenizer, ids)
    return {"input_ids": ended, "labels": labels + ended[len(ids) :]}


def tokenize_parts(tokenizer: Any, parts: list[tuple[str, bool]], ended: bool = True) -> Tokens:
    """Parts of one text, each learnt or not; the text is tokenised as a whole.

    A token that holds one part's last characters and the next part's first belongs to the next.

    Args:
        tokenizer: A transformers tokenizer.
        parts: Each part's text, and whether it is learnt; nothing is put between them.
        ended: Put an end-of-text token behind, learnt if the last part is.
    """
    ends = list(itertools.accumulate(len(text) for text, _ in parts))
    ids, places = _encoded(tokenizer, "".join(text for text, _ in parts), ends, special=True)
    # Special tokens, in front or behind, end at character 0.
    learnt = [place > 0 and parts[bisect.bisect_left(ends, place)][1] for place in places]
    plain = len(ids) - (len(ids) > 0 and ids[-1] == tokenizer.eos_token_id and not places[-1])
    ids, learnt = ids[:plain], learnt[:plain]
    if ended and tokenizer.eos_token_id is not None:
        ids, learnt = [*ids, tokenizer.eos_token_id], [*learnt, parts[-1][1]]
    return {"input_ids": ids, "labels": [token if use else IGNORED for token, use in zip(ids, learnt)]}


def tokenize_messages(
    tokenizer: Any,
    messages: Messages,
    assistant_only: bool = True,
    first_turn: int = 0,
    chat_template: str | None = None,
    tools: list[Any] | None = None,
    **template_arguments: Any,
) -> Tokens:
    """A conversation through the chat template; the assistant's turns learnt, each with its end-of-turn token.

    What the template writes before an assistant's text (its generation prompt) is not learnt, nor is the white space
    after the end-of-turn token, which a model never writes. With `{% generation %}` marks the template says itself what
    is learnt, and an end-of-turn token right behind is added; without, its rendering is compared turn by turn.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        messages: Turns with `role` and `content`.
        assistant_only: Learn the assistant's turns only, rather than everything from `first_turn` on.
        first_turn: Learn nothing of the turns before this one (they are a prompt).
        chat_template: In place of the tokenizer's own.
        tools: Tools the template may name.
        **template_arguments: Further variables of the template.

    Raises:
        ValueError: No template, or one that cannot be masked: a conversation's beginning, rendered, is not the
            beginning of the conversation rendered.
    """
    options = {"chat_template": chat_template, "tools": tools, **template_arguments}
    template = chat_template or _own_template(tokenizer)
    full = _render(tokenizer, messages, options)
    if not assistant_only:
        begin = len(_beginning(tokenizer, messages, first_turn, full, options)) if first_turn else 0
        return _labelled(tokenizer, full, [(begin, len(full))])
    if has_generation_marks(template):
        return _by_marks(tokenizer, messages, first_turn, options)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and turn >= first_turn:
            begin = len(_beginning(tokenizer, messages, turn, full, options))
            end = len(_beginning(tokenizer, messages, turn + 1, full, options, prompt=False))
            spans.append((begin, _end_of_turn(tokenizer, full, begin, end)))
    return _labelled(tokenizer, full, spans)


def _own_template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ValueError(
            "the rows are conversations and the tokenizer has no chat template: give chat_template=, use an "
            "instruction-tuned model's tokenizer, or rows with 'prompt' and 'completion'."
        )
    return template


def _render(tokenizer: Any, messages: Messages, options: dict[str, Any], prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)


def _beginning(
    tokenizer: Any, messages: Messages, turn: int, full: str, options: dict[str, Any], prompt: bool = True
) -> str:
    """The rendering of the turns before `turn`, checked to be the beginning of `full`."""
    try:
        begin = _render(tokenizer, messages[:turn], options, prompt)
    except Exception as error:  # a template may raise anything, such as "conversation must start with user"
        raise ValueError(
            f"the chat template cannot be masked: it refuses the first {turn} of {len(messages)} turns "
            f"({type(error).__name__}: {error}). {_WAY_OUT}"
        ) from error
    if not full.startswith(begin):
        same = next(i for i, (a, b) in enumerate(zip(begin + "\0", full + "\1")) if a != b)
        raise ValueError(
            f"the chat template cannot be masked: rendered alone, the first {turn} of {len(messages)} turns"
            f"{' with a generation prompt' if prompt else ''} are not the beginning of the whole conversation; they "
            f"differ at {begin[same : same + 30]!r} against {full[same : same + 30]!r}. {_WAY_OUT}"
        )
    return begin


def _end_of_turn(tokenizer: Any, full: str, begin: int, end: int) -> int:
    """Where an assistant's turn ends: behind its end-of-turn token, if only white space follows that."""
    text = full[begin:end]
    last = max((text.rfind(token) + len(token) for token in tokenizer.all_special_tokens if token in text), default=0)
    return begin + last if last and not text[last:].strip() else end


def _by_marks(tokenizer: Any, messages: Messages, first_turn: int, options: dict[str, Any]) -> Tokens:
    made = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    ids, learnt = list(made["input_ids"]), list(made["assistant_masks"])
    special = set(tokenizer.all_special_ids)
    for place in range(len(ids) - 1, 0, -1):
        if learnt[place - 1] and not learnt[place] and ids[place] in special and ids[place - 1] not in special:
            learnt[place] = 1
    if first_turn:
        full = _render(tokenizer, messages, options)
        before, _ = _encoded(tokenizer, _beginning(tokenizer, messages, first_turn, full, options))
        learnt[: len(before)] = [0] * len(before)
    return {"input_ids": ids, "labels": [token if use else IGNORED for token, use in zip(ids, learnt)]}


def _labelled(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> Tokens:
    ids, ends = _encoded(tokenizer, text, [border for span in spans for border in span])
    labels = [IGNORED] * len(ids)
    for begin, end in spans:
        for place, token_end in enumerate(ends):
            if begin < token_end <= end:
                labels[place] = ids[place]
    return {"input_ids": ids, "labels": labels}


def _encoded(
    tokenizer: Any, text: str, borders: list[int] | None = None, special: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids and the character behind each token.

    A tokenizer that cannot tell characters is asked piece by piece between `borders`; all pieces must be those of the
    whole text.
    """
    if getattr(tokenizer, "is_fast", False):
        made = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        return list(made["input_ids"]), [end for _, end in made["offset_mapping"]]
    whole = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    cuts = sorted({0, len(text), *(borders or [])})
    pieces = [
        (token, end)
        for begin, end in itertools.pairwise(cuts)
        for token in tokenizer(text[begin:end], add_special_tokens=False)["input_ids"]
    ]
    if [token for token, _ in pieces] != plain:
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell which characters a token holds, and cuts this text differently "
            "in pieces: use its fast version to learn a part of a text only."
        )
    lead = next((i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain), 0)
    ends = [0] * lead + [end for _, end in pieces]
    return whole, ends + [0] * (len(whole) - len(ends))


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """With the end-of-text token behind, once."""
    eos = tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]
