"""What a model is asked: instruction and input of a record, and the order they stand in."""

from __future__ import annotations

from tkpo.attributes import Axis, detect_language
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
