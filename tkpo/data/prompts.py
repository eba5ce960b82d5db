"""What a model is asked: instruction and input of a record, and the order they stand in."""

from __future__ import annotations

from tkpo.attributes import Axis, Found, detect_language
from tkpo.errors import TKPOError

INSTRUCTION_FIRST, ARTICLE_FIRST = PROMPT_ORDERS = ("instruction_first", "article_first")


def make_input(axis: Axis, topic: str, document: str | None, lang: str) -> str:
    """The `input` field: topic line and article in English, the article alone in Chinese (as published)."""
    if document and lang == "zh":
        return document
    topic_line = axis.topics[lang].replace("{topic}", topic)
    return f"{topic_line}\n\n{document}" if document else topic_line


def user_message(record: dict) -> str:
    """Instruction and input as one message.

    Instruction first, they are joined by a line break, as LLaMA-Factory joins them. In a record that `arrange` put
    in the other order the input comes first, then a blank line and the instruction.
    """
    instruction, article = record["instruction"], record.get("input") or ""
    if record.get("prompt_order") == ARTICLE_FIRST:
        return f"{article}\n\n{instruction}"
    return "\n".join(part for part in (instruction, article) if part)


def make_record(axis: Axis, attribute: str, topic: str, document: str | None = None, lang: str | None = None):
    """A record without output, ready for generation. `lang` None: found from topic and document."""
    lang = lang or detect_language(f"{topic} {document or ''}")
    return {
        "instruction": axis.instruction(attribute, lang),
        "input": make_input(axis, topic, document, lang),
        "lang": lang,
        "axis": axis.name,
        "attribute": attribute,
        "form": "article" if document else "topic",
    }


def chat_messages(record: dict, output: str | None = None) -> list[dict[str, str]]:
    """A record as the turns of a chat: system, earlier turns, the user's message and, if given, the response."""
    turns = [("system", record["system"])] if record.get("system") else []
    for asked, answered in record.get("history") or ():
        turns += [("user", asked), ("assistant", answered)]
    turns.append(("user", user_message(record)))
    turns += [] if output is None else [("assistant", output)]
    return [{"role": role, "content": text} for role, text in turns]


def find_attribute(record: dict, axis: Axis) -> Found | None:
    """The attribute that a record's prompt asks for, or None.

    It is looked for in the instruction, then in the input, then in the earlier turns of the user from the last to the
    first, then in the system turn; within a text by `Axis.locate`.
    """
    place = attribute_place(record, axis)
    return place[1] if place else None


def flip_record(record: dict, axis: Axis) -> dict:
    """The record with the attribute phrase of its prompt replaced by its flip's, in the case it is written in.

    TKPOError if its prompt has none.
    """
    place = attribute_place(record, axis)
    if place is None:
        raise TKPOError(axis.missing(user_message(record)))
    (key, turn), found = place
    if turn is None:
        return {**record, key: axis.replace(record[key], found)}
    history = [list(pair) for pair in record["history"]]
    history[turn][0] = axis.replace(history[turn][0], found)
    return {**record, "history": history}


def attribute_place(record: dict, axis: Axis) -> tuple[tuple[str, int | None], Found] | None:
    """((field, turn of the history or None), the phrase there) of the attribute in a record."""
    history = record.get("history") or []
    texts = [(("instruction", None), record["instruction"]), (("input", None), record.get("input"))]
    texts += [(("history", turn), history[turn][0]) for turn in reversed(range(len(history)))]
    texts.append((("system", None), record.get("system")))
    for place, text in texts:
        if text and (found := axis.locate(text)):
            return place, found
    return None


def arrange(record: dict, axis: Axis, prompt_order: str) -> dict:
    """A record whose prompt stands in the given order.

    record: annotated, or made by `make_record`: it has `attribute` and `lang`.
    axis: the axis of `record`.
    prompt_order: "instruction_first", the published order: the record is returned as it is. "article_first": the
        instruction comes after the input, in the axis's words for that place, so that all samples of an article
        share its tokens, and the true prompt and the flipped one differ only at their ends.

    Raises:
        TKPOError: for an unknown order, and for a record in words of its own: only the axis's own instruction has
            a counterpart for the other place, and moved as it is it would end in "Input:" with nothing after it.
    """
    if prompt_order not in PROMPT_ORDERS:
        raise TKPOError(f"prompt_order is {prompt_order!r}; it must be one of {', '.join(PROMPT_ORDERS)}")
    if prompt_order == INSTRUCTION_FIRST or record.get("prompt_order") == prompt_order:
        return record
    attribute, lang = record["attribute"], record["lang"]
    if record["instruction"].strip() != axis.instruction(attribute, lang).strip() or not record.get("input"):
        raise TKPOError(
            f"record {record.get('id', '')}: article_first needs the instruction of the axes table "
            f"({axis.instruction(attribute, lang)!r}) and the article in `input`; this instruction is "
            f"{record['instruction'][:120]!r}. Train with prompt_order instruction_first, or put your wording into an "
            "axes table as `instruction` and `instruction_after`"
        )
    return {**record, "instruction": axis.instruction(attribute, lang, after=True), "prompt_order": ARTICLE_FIRST}
