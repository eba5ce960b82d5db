"""Long documents: the article's tail is cut, never the instruction, the response or the end of the turn."""

import json
import logging
from pathlib import Path

import pytest

from tkpo.attributes import get_axis
from tkpo.data import arrange, as_records, chat_messages, fit_prompt, make_record, user_message
from tkpo.encoding import encode_dataset, encode_record
from tkpo.errors import TKPOError
from tkpo.flip import PromptFlipper

LONG = json.loads((Path(__file__).parent / "cases" / "long-zh.json").read_text(encoding="utf-8"))
AXIS = get_axis("language_style")


def chat(tokenizer, message, system=None):
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": message})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def article(lang, paragraphs=12):
    text = "The tide came in over the flats and the boats rose." if lang == "en" else "潮水漫过滩涂，船浮了起来。"
    return "\n\n".join(f"{text} {number}" for number in range(paragraphs))


def one_text(before, after, lang):
    """The article and an instruction, all in the instruction field."""
    instruction = {"en": "Requirement: literary.", "zh": "要求：文学诗意。"}[lang]
    parts = ([instruction + "\n"] if before else []) + [article(lang)] + ([f"\n\n{instruction}"] if after else [])
    return {"instruction": "".join(parts), "input": ""}, instruction


RECORDS = {
    "instruction first": lambda lang: make_record(AXIS, "literary", "潮 tide", article(lang), lang),
    "article first": lambda lang: arrange(
        make_record(AXIS, "literary", "潮 tide", article(lang), lang), AXIS, "article_first"
    ),
    "instruction first, in one text": lambda lang: one_text(True, False, lang)[0],
    "article first, in one text": lambda lang: one_text(False, True, lang)[0],
    "article first, in the instruction": lambda lang: {
        "instruction": article(lang),
        "input": one_text(False, True, lang)[1],
    },
    "all in the input": lambda lang: {
        "instruction": "Outline.",
        "input": one_text(True, False, lang)[0]["instruction"],
    },
    "with a system turn": lambda lang: {
        **make_record(AXIS, "literary", "潮 tide", article(lang), lang),
        "system": "You outline documents.",
        "history": [["Hello", "Send me one."]],
    },
    "one line": lambda lang: {"instruction": "Be literary: " + article(lang).replace("\n", " "), "input": ""},
}


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("make", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_what_is_cut_is_the_articles_tail(tiny_tokenizer, qwen_tokenizer, make, lang, share):
    for tokenizer in (tiny_tokenizer, qwen_tokenizer):
        record = make(lang)
        whole = fit_prompt(record, tokenizer, 10**6)
        assert whole.cut == 0 and whole.record is record
        room = int(len(whole.ids) * share)
        fitted = fit_prompt(record, tokenizer, room)
        assert len(fitted.ids) <= room and fitted.cut == len(whole.ids) - len(fitted.ids)
        assert len(fitted.ids) > room - 16  # no more is cut than must be
        before, after = user_message(record), user_message(fitted.record)
        start = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
        tail = after[start:]
        assert before.endswith(tail) and len(after) < len(before)
        found = AXIS.locate(after)
        assert found and found.attribute == "literary"
        assert article(lang).replace("\n", " ")[:40] in after.replace("\n", " ")  # the head of the article stays
        if "article first" not in next(name for name, made in RECORDS.items() if made is make):
            assert tail == ""
        else:
            assert tail.strip() in (record["instruction"].strip(), one_text(False, True, lang)[1])
        expected = tokenizer.apply_chat_template(
            chat_messages(fitted.record), tokenize=False, add_generation_prompt=True
        )
        assert fitted.ids == tokenizer(expected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("make", RECORDS.values(), ids=RECORDS)
def test_a_cut_sample_keeps_its_response_and_end_of_turn(tiny_tokenizer, make):
    record = {**make("en"), "output": "1. The tide\n2. The boats"}
    flipper = PromptFlipper(tiny_tokenizer, AXIS)
    (whole,) = encode_dataset([record], tiny_tokenizer, flipper, 10**6)
    room = int(0.7 * len(whole["input_ids"]))
    (row,) = encode_dataset([record], tiny_tokenizer, flipper, room)
    response = tiny_tokenizer("1. The tide\n2. The boats<|im_end|>\n", add_special_tokens=False)["input_ids"]
    assert len(row["input_ids"]) <= room
    for prefix in ("", "flipped_"):
        ids, labels = row[f"{prefix}input_ids"], row[f"{prefix}labels"]
        assert ids[-len(response) :] == response
        assert labels == [-100] * (len(ids) - len(response)) + response
    true, flipped = (tiny_tokenizer.decode(row[f"{p}input_ids"]) for p in ("", "flipped_"))
    assert flipped == true.replace("literary", "objective", 1) != true


def test_records_of_the_published_length_fit_the_default_length(qwen_tokenizer):
    from tkpo.run_config import RunConfig
    from tkpo.training import TKPOConfig

    for config in (RunConfig(), TKPOConfig(output_dir="x", use_cpu=True, report_to=[])):
        flipper = PromptFlipper(qwen_tokenizer, AXIS)
        rows = encode_dataset(LONG, qwen_tokenizer, flipper, config.max_length)
        assert len(rows) == len(LONG) == 12
        for row, record in zip(rows, LONG, strict=True):
            message = record["instruction"] + "\n" + record["input"]
            response = qwen_tokenizer(record["output"] + "<|im_end|>\n", add_special_tokens=False)["input_ids"]
            assert row["input_ids"] == chat(qwen_tokenizer, message) + response


def test_one_line_says_how_many_records_were_cut_and_by_how_much(tiny_tokenizer, samples, caplog):
    records = [s.record for s in samples]
    lengths = [len(encode_record(r, tiny_tokenizer, 4096)[0]) for r in records]
    longest, others = max(lengths), sorted(lengths)[:-1]
    assert others[-1] < longest - 3
    with caplog.at_level(logging.WARNING, logger="tkpo.encoding"):
        encode_dataset(records, tiny_tokenizer, None, longest)
        assert not caplog.records
        encode_dataset(records, tiny_tokenizer, None, longest - 3)
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == (
        f"1 of 4 records are longer than max_length {longest - 3}: their articles were cut by 3 to 3 tokens (median 3)"
    )


def test_a_record_that_cannot_fit_says_which_length_would_do(tiny_tokenizer, samples):
    record = {**samples[0].record, "id": "sea"}
    whole = len(encode_record(record, tiny_tokenizer, 4096)[0])
    with pytest.raises(TKPOError) as error:
        encode_dataset([samples[1].record, record], tiny_tokenizer, None, 100)
    assert str(error.value).startswith("record 1: does not fit in max_length 100: its response has ")
    with pytest.raises(TKPOError, match=f"A max_length of {whole} takes it whole"):
        encode_dataset([record], tiny_tokenizer, None, 100)
    encode_dataset([record], tiny_tokenizer, None, whole)
    with pytest.raises(TKPOError, match="only 50 have room; without its article it needs "):
        fit_prompt(record, tiny_tokenizer, 50)


# ---- templates


def with_template(tokenizer, template):
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def test_templates_that_would_train_on_something_else_are_refused(tiny_tokenizer, samples):
    record = samples[0].record
    with pytest.raises(TKPOError, match="no chat template"):
        encode_record(record, with_template(tiny_tokenizer, None), 4096)
    with pytest.raises(TKPOError, match=r"ignores add_generation_prompt.*<\|im_start\|>assistant"):
        encode_record(record, with_template(tiny_tokenizer, CHATML), 4096)
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    with pytest.raises(TKPOError, match=r"does not take the turns system, user: no system"):
        encode_record({**record, "system": "Be kind."}, with_template(tiny_tokenizer, no_system), 4096)


def test_a_template_without_a_header_of_the_assistants_turn_is_fine(tiny_tokenizer, samples):
    """As Mistral's: the response follows the user's turn directly."""
    turn = "'[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] + '<|im_end|>'"
    template = "{% for m in messages %}{{ " + turn + " }}{% endfor %}"
    ids, length = encode_record(samples[0].record, with_template(tiny_tokenizer, template), 4096)
    assert tiny_tokenizer.decode(ids[length:]) == f" {samples[0].record['output']}<|im_end|>"


def test_system_and_history_are_part_of_the_prompt(tiny_tokenizer):
    (record,) = as_records(json.loads((Path(__file__).parent / "cases" / "history.json").read_text(encoding="utf-8")))
    ids, length = encode_record(record, tiny_tokenizer, 4096)
    assert tiny_tokenizer.decode(ids[:length]) == (
        "<|im_start|>system\nYou outline documents.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi, send me a document.<|im_end|>\n<|im_start|>user\n"
        + user_message(record)
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
