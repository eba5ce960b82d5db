"""Prompts as a tokenizer renders them, and the article cut where a prompt is too long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tkpo.attributes import Axis, load_axes
from tkpo.data.prompts import attribute_place, chat_messages
from tkpo.errors import TKPOError


class Fitted(NamedTuple):
    """A prompt that fits: its token ids, the record with what is left of its article, how many tokens were cut."""

    ids: list[int]
    record: dict
    cut: int


def prompt_text(record: dict, tokenizer) -> str:
    """A record's prompt in the tokenizer's chat template, up to where the response begins."""
    return _render(chat_messages(record), tokenizer, add_generation_prompt=True)


def response_text(record: dict, tokenizer) -> str:
    """What follows `prompt_text`: the record's output, ended as the template ends an assistant's turn.

    TKPOError if the template does not put the output there: what stands before it would be trained as response.
    """
    prompt = prompt_text(record, tokenizer)
    whole = _render(chat_messages(record, record["output"]), tokenizer, add_generation_prompt=False)
    if not whole.startswith(prompt):
        raise TKPOError("this tokenizer's chat template does not put the response after the generation prompt")
    response = whole[len(prompt) :]
    ignored = prompt == _render(chat_messages(record), tokenizer, add_generation_prompt=False)
    if ignored and not response.lstrip().startswith(record["output"].lstrip()[:20]):
        raise TKPOError(
            "this tokenizer's chat template ignores add_generation_prompt, so that the header of the assistant's turn "
            f"({response[:40]!r}) would be trained as response: use a template that ends the prompt with it"
        )
    return response


def _render(messages: list[dict], tokenizer, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise TKPOError(
            "this tokenizer has no chat template: use an instruct model's, or set tokenizer.chat_template before"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise TKPOError(f"this tokenizer's chat template does not take the turns {roles}: {error}") from error


def encode_text(text: str, tokenizer) -> list[int]:
    """Token ids of rendered text, which brings its own special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def fit_prompt(record: dict, tokenizer, max_tokens: int, axes: Iterable[Axis] | None = None) -> Fitted:
    """A record's prompt in at most `max_tokens` tokens: where it has more, the tail of its article is cut.

    The instruction stays whole wherever it stands. The article is the record's `input`; where the attribute phrase
    stands in `input` too, the article is `instruction` if that is the longer text, else the longer of what comes
    before and after the line with the phrase; the same where all stands in `instruction`.

    record: with or without output, which is not looked at.
    tokenizer: whose tokens and chat template.
    max_tokens: of the prompt alone.
    axes: whose phrases are looked for; default the shipped ones.

    Raises:
        TKPOError: if the prompt does not fit without any article; says how many tokens would do.
    """
    ids = encode_text(prompt_text(record, tokenizer), tokenizer)
    if len(ids) <= max_tokens:
        return Fitted(ids, record, 0)
    key, start, end = article_span(record, load_axes().values() if axes is None else axes)
    text = record[key]

    def shortened(length: int) -> tuple[dict, list[int]]:
        made = {**record, key: text[:start] + text[start : start + length].rstrip() + text[end:]}
        return made, encode_text(prompt_text(made, tokenizer), tokenizer)

    fits, low, high = None, 1, min(end - start, 32 * max(max_tokens, 1))
    while low <= high:  # the longest beginning that fits
        middle = (low + high) // 2
        made, found = shortened(middle)
        if len(found) <= max_tokens:
            fits, low = Fitted(found, made, len(ids) - len(found)), middle + 1
        else:
            high = middle - 1
    if fits is None:
        least = len(shortened(1)[1])
        raise TKPOError(
            f"its prompt has {len(ids)} tokens and only {max_tokens} have room; without its article it "
            f"needs {min(least, len(ids))}"
        )
    return fits


def article_span(record: dict, axes: Iterable[Axis]) -> tuple[str, int, int]:
    """(field, start, end): the characters of a record's article, which may be cut from their end."""
    key = "input" if record.get("input") else "instruction"
    text = record[key]
    places = (attribute_place(record, axis) for axis in axes)
    place, found = next((found for found in places if found), ((None, None), None))
    if place != (key, None):  # the attribute stands in another text
        return key, 0, len(text)
    if key == "input" and len(record["instruction"]) > len(text):  # the article is in `instruction`, before its request
        return "instruction", 0, len(record["instruction"])
    if key == "input" and len(record["instruction"]) > len(text):  # `input` asks for the outline of what is above
        return "instruction", 0, len(record["instruction"])
    line_start = text.rfind("\n", 0, found.start) + 1
    line_end = text.find("\n", found.end)
    line_end = len(text) if line_end < 0 else line_end
    if not text[:line_start].strip() and not text[line_end:].strip():  # all in one line
        line_start, line_end = found.start, found.end
    before, after = len(text[:line_start].rstrip()), len(text) - line_end
    return (key, 0, before) if before > after else (key, line_end, len(text))
