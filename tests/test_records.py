"""Whatever enters becomes the same records: shapes, files, faults, the attribute."""

import json
import logging
from pathlib import Path

import pytest

from tkpo.attributes import get_axes, get_axis
from tkpo.data import (
    annotate,
    as_records,
    chat_messages,
    check,
    find_attribute,
    flip_record,
    load_records,
    record_key,
    records_digest,
    user_message,
)
from tkpo.encoding import encode_dataset
from tkpo.errors import TKPOError
from tkpo.flip import PromptFlipper

CASES = Path(__file__).parent / "cases"
AXIS = get_axis("language_style")
BASIC = {
    "instruction": "Requirement: literary. Input:\n",
    "input": "Topic: Salt roads",
    "output": "1. White grains\n2. The road remembers feet",
}
ASKED = BASIC["instruction"] + "\n" + BASIC["input"]


def case(name):
    return json.loads((CASES / f"{name}.json").read_text(encoding="utf-8"))


def write(folder, rows, name="a.json"):
    path = folder / name
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


# ---- shapes

USER, ANSWER = {"role": "user", "content": ASKED}, {"role": "assistant", "content": BASIC["output"]}
SHAPES = {
    "alpaca": BASIC,
    "alpaca, all in the instruction": {"instruction": ASKED, "output": BASIC["output"]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": BASIC["output"]}],
    },
    "messages": {"messages": [USER, ANSWER]},
    "messages with text parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": ASKED}]}, ANSWER],
    },
    "prompt and completion, chat": {"prompt": [USER], "completion": [ANSWER]},
    "prompt and completion, text": {"prompt": ASKED, "completion": BASIC["output"]},
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("container", ["list", "dataset", "json", "jsonl"])
def test_the_same_sample_in_every_shape_has_the_same_tokens(tiny_tokenizer, tmp_path, row, container):
    from datasets import Dataset

    flipper = PromptFlipper(tiny_tokenizer, AXIS)
    if container == "dataset":
        if isinstance(row.get("messages", [USER])[0]["content"], list):  # Arrow does not mix text and lists
            answer = {"role": "assistant", "content": [{"type": "text", "text": BASIC["output"]}]}
            row = {"messages": [row["messages"][0], answer]}
        given = Dataset.from_list([row, {**row, "extra": None}])
    elif container == "list":
        given = [row, row]
    else:
        path = tmp_path / f"a.{container}"
        lines = [json.dumps(row), json.dumps(row)]
        path.write_text(f"[{','.join(lines)}]" if container == "json" else "\n".join(lines), encoding="utf-8")
        assert check([path]) == (2, [])
        given = load_records(str(path))
    rows = encode_dataset(given, tiny_tokenizer, flipper, 4096)
    assert rows.to_list() == encode_dataset([BASIC, BASIC], tiny_tokenizer, flipper, 4096).to_list()
    expected = f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n{BASIC['output']}<|im_end|>\n"
    assert tiny_tokenizer.decode(rows[0]["input_ids"]).endswith(expected)


SYSTEM = {"role": "system", "content": "You outline documents."}
HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Send me one."}]
LONGER = {
    "alpaca": {**BASIC, "system": SYSTEM["content"], "history": [["Hello", "Send me one."]]},
    "sharegpt": {
        "system": SYSTEM["content"],
        "conversations": [
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "Send me one."},
            {"from": "human", "value": ASKED},
            {"from": "gpt", "value": BASIC["output"]},
        ],
    },
    "messages": {"messages": [SYSTEM, *HELLO, USER, ANSWER]},
    "prompt and completion": {"prompt": [SYSTEM, *HELLO, USER], "completion": [ANSWER]},
}


@pytest.mark.parametrize("row", LONGER.values(), ids=LONGER)
def test_system_and_earlier_turns_are_kept(row):
    (record,) = as_records([row])
    assert chat_messages(record, record["output"]) == [SYSTEM, *HELLO, USER, ANSWER]


PAIR = {"instruction": ASKED, "chosen": "1. White grains", "rejected": "1. Origin"}
PAIRS = {
    "alpaca": PAIR,
    "prompt, text": {"prompt": ASKED, "chosen": PAIR["chosen"], "rejected": PAIR["rejected"]},
    "prompt, chat": {
        "prompt": [USER],
        **{name: [{"role": "assistant", "content": PAIR[name]}] for name in ("chosen", "rejected")},
    },
    "implicit prompt": {name: [USER, {"role": "assistant", "content": PAIR[name]}] for name in ("chosen", "rejected")},
    "sharegpt": {
        "conversations": [{"from": "human", "value": ASKED}],
        **{name: {"from": "gpt", "value": PAIR[name]} for name in ("chosen", "rejected")},
    },
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_pairs_come_in_every_shape(row):
    (record,) = as_records([row], pairs=True)
    assert record == {**PAIR, "input": ""}


def test_what_trl_makes_of_its_own_shapes_is_the_same_conversation():
    """TRL's helpers as the oracle: ShareGPT to messages, and an implicit prompt made explicit."""
    data_utils = pytest.importorskip("trl.data_utils")
    converted = data_utils.maybe_convert_to_chatml(json.loads(json.dumps(SHAPES["sharegpt"])))
    (record,) = as_records([SHAPES["sharegpt"]])
    roles = {"human": "user", "gpt": "assistant"}
    turns = [{**turn, "role": roles[turn["role"]]} for turn in converted["messages"]]
    assert chat_messages(record, record["output"]) == turns
    explicit = data_utils.extract_prompt(PAIRS["implicit prompt"])
    assert as_records([explicit], pairs=True) == as_records([PAIRS["implicit prompt"]], pairs=True)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"question": "Why?", "answer": "So."}, "no field 'instruction'; its fields are 'question', 'answer'"),
        ({"data": [BASIC]}, "no field 'instruction'; its fields are 'data'"),
        ({"messages": [USER]}, "the last turn of 'messages' is not the assistant's"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "hi"}, "'messages' is str, not a list of turns"),
        ({"messages": ["hi"]}, "turn 1 of 'messages' is str"),
        ({"messages": [USER, USER, ANSWER]}, "must be the user's and the assistant's in turn"),
        ({"messages": [ANSWER]}, "no turn of the user before the response"),
        ({"messages": [SYSTEM, ANSWER]}, "no turn of the user before the response"),
        ({"messages": [USER, SYSTEM, ANSWER]}, "in turn"),
        ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "turn 2 of 'messages' has the role 'tool'"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "turn 1 of 'messages' has no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "turn 1 of 'messages' has no text"),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "x"}, "a field 'system' and a system turn"),
        ({**BASIC, "messages": [USER, ANSWER]}, "both 'instruction' and 'messages'"),
        ({"messages": [USER, ANSWER], "conversations": [USER, ANSWER]}, "both 'conversations' and 'messages'"),
        ({"prompt": ASKED}, "a 'prompt' without 'completion'"),
        ({"prompt": ASKED, "completion": [ANSWER]}, "'prompt' is text, but 'completion' is list"),
        ({"prompt": [USER], "completion": [USER]}, "'completion' must be one turn, the assistant's"),
        ({"prompt": [USER], "completion": [ANSWER, ANSWER]}, "'completion' must be one turn"),
        ({"prompt": ASKED, "completion": " "}, "field 'output' is empty"),
        ({"prompt": 5, "completion": "x"}, "'prompt' is int, not a list of turns"),
        ({**BASIC, "system": 5}, "field 'system' is int"),
        ({**BASIC, "history": "Hello"}, "field 'history'"),
        ({**BASIC, "history": [["Hello"]]}, "field 'history'"),
        ({**BASIC, "tools": "[...]"}, "field 'tools' is not supported"),
        ({**BASIC, "images": ["a.png"]}, "field 'images' is not supported"),
        ({**BASIC, "form": "topics"}, "field 'form' is 'topics', not one of article, topic"),
        ({**BASIC, "form": None}, "field 'form' is None"),
        ({**BASIC, "lang": None}, "field 'lang' is None"),
        ({**BASIC, "lang": "EN"}, "field 'lang' is 'EN', not one of en, zh"),
        ({**BASIC, "length": "tiny"}, "field 'length' is 'tiny'"),
        ({**BASIC, "attribute": None}, "field 'attribute' is None, not a name"),
        ({**BASIC, "attribute": 3}, "field 'attribute' is 3"),
        ({**BASIC, "axis": ""}, "field 'axis' is ''"),
        ({**BASIC, "id": ["a"]}, "field 'id' is list"),
        ({**BASIC, "output": None}, "field 'output' is NoneType, not text"),
        ({**BASIC, "output": 7}, "field 'output' is int, not text"),
        ("text", "expected an object, found str"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_everywhere(tmp_path, tiny_tokenizer, row, fault):
    """The same words from a file, from `data check`, and from what a Trainer encodes."""
    path = write(tmp_path, [BASIC, row])
    found = []
    for use in (
        lambda: load_records(str(path)),
        lambda: as_records([BASIC, row]),
        lambda: encode_dataset([BASIC, row], tiny_tokenizer, None, 4096),
    ):
        with pytest.raises(TKPOError) as error:
            use()
        found.append(str(error.value))
    found += check([path])[1]
    assert all("record 2: " in text and fault in text for text in found), found
    assert str(path) in found[0] and len(found) >= 4


def test_prompts_alone_need_no_output():
    rows = [{"instruction": ASKED}, {"messages": [USER]}, {"prompt": ASKED}, {"prompt": [USER]}]
    for record in as_records(rows, needs_output=False):
        assert user_message(record) == ASKED and "output" not in record


# ---- what a record lacks


def test_input_missing_or_null_is_empty():
    for row in case("no-input"):
        (record,) = annotate(as_records([row]), AXIS)
        assert record["input"] == "" and user_message(record) == row["instruction"]
        assert record["attribute"] == "objective"


def test_ids_that_are_null_or_repeated_keep_every_sample():
    records = annotate(as_records(case("ids")), AXIS)
    assert [r["output"].split()[1] for r in records] == ["Salt", "Reefs", "Bridges", "Owls"]
    assert [r["id"] for r in records] == ["1", "2", "2", "4"]


def test_the_digest_tells_lists_of_records_apart():
    records = annotate(as_records(case("ids")), AXIS)
    digest = records_digest(records)
    assert digest == records_digest(json.loads(json.dumps(records))) and len(digest) == 64
    keys = ("instruction", "input", "output", "id", "attribute")
    changed = [[{**records[0], key: "x"}, *records[1:]] for key in keys]
    others = [records[::-1], records[:-1], [*records, records[0]], *changed]
    assert record_key(records[1]) == record_key(records[2])  # which the key does not
    assert len({digest, *map(records_digest, others)}) == len(others) + 1


# ---- the attribute


def test_wrong_attributes_are_refused_when_the_file_is_read(tmp_path):
    wrong, null = case("wrong-attribute")
    with pytest.raises(TKPOError, match=r"a\.json, record 1: field 'attribute' is 'Literary'; axis \w+ has lit"):
        load_records(str(write(tmp_path, [wrong])), axes=AXIS)
    with pytest.raises(TKPOError, match=r"a\.json, record 1: field 'lang' is None"):
        load_records(str(write(tmp_path, [null])))
    other = {**BASIC, "attribute": "objective"}
    with pytest.raises(TKPOError, match=r"a\.json, record 2: field 'attribute' is 'objective', but its prompt"):
        load_records(str(write(tmp_path, [BASIC, other])), axes=AXIS)
    with pytest.raises(TKPOError, match=r"record 1: field 'axis' is 'level_of_detail', not language_style"):
        load_records(str(write(tmp_path, [{**BASIC, "axis": "level_of_detail"}])), axes=AXIS)
    with pytest.raises(TKPOError, match=r"b\.json, record 1: no attribute phrase of axis language_style \(literary"):
        load_records(str(write(tmp_path, [{**BASIC, "instruction": "Be kind."}], "b.json")), axes=AXIS)


@pytest.mark.parametrize("number", [0, 1])
def test_of_two_phrases_the_one_in_the_instructions_place_is_flipped_and_scored(qwen_tokenizer, number):
    row = case("two-phrases")[number]
    (record,) = annotate(as_records([row]), AXIS)
    assert record["attribute"] == "objective"
    flipped = row["instruction"].replace("Requirement: objective", "Requirement: literary")
    assert flip_record(record, AXIS)["instruction"] == flipped
    (encoded,) = encode_dataset([row], qwen_tokenizer, PromptFlipper(qwen_tokenizer, AXIS), 4096)
    (expected,) = encode_dataset([{**row, "instruction": flipped}], qwen_tokenizer, None, 4096)
    assert encoded["flipped_input_ids"] == expected["input_ids"]


@pytest.mark.parametrize("row", case("attribute-forms"), ids=lambda row: row["instruction"].strip())
def test_every_form_of_an_attribute_trains(qwen_tokenizer, row):
    (record,) = annotate(as_records([row]), AXIS)
    assert record["attribute"] == "literary"
    (encoded,) = encode_dataset([row], qwen_tokenizer, PromptFlipper(qwen_tokenizer, AXIS), 4096)
    swap = {"Literary": "Objective", "LITERARY": "OBJECTIVE", "literary": "objective", "文学诗意": "真实客观"}
    old = next(word for word in swap if word in row["instruction"])
    (expected,) = encode_dataset(
        [{**row, "instruction": row["instruction"].replace(old, swap[old])}], qwen_tokenizer, None, 4096
    )
    assert encoded["flipped_input_ids"] == expected["input_ids"]


@pytest.mark.parametrize(
    ("record", "place"),
    [
        ({"instruction": "Be literary.", "input": "An objective jury."}, "instruction"),
        ({"instruction": "Outline this.", "input": "Literary, please."}, "input"),
        ({"instruction": "More.", "history": [["Be objective.", "1."], ["Be literary.", "2."]]}, "history"),
        ({"instruction": "More.", "history": [["Be kind.", "A literary B"]], "system": "Be literary."}, "system"),
    ],
)
def test_the_instruction_is_searched_first_then_input_earlier_turns_and_system(record, place):
    record = {"input": "", **record}
    assert find_attribute(record, AXIS).attribute == "literary"
    flipped = flip_record(record, AXIS)
    changed = {key for key in record if record[key] != flipped[key]}
    assert changed == {place}
    assert json.dumps(record).count("iterary") - json.dumps(flipped).count("iterary") == 1


def test_each_sample_of_several_sets_is_flipped_on_its_own_axis(tiny_tokenizer):
    axes = get_axes("language_style,level_of_detail")
    rows = [
        {**BASIC, "instruction": f"Requirement: {word}.", "axis": axis}
        for axis, word in zip(
            ("language_style", "level_of_detail", "level_of_detail"), ("objective", "objective", "concise"), strict=True
        )
    ]
    encoded = encode_dataset(rows, tiny_tokenizer, PromptFlipper(tiny_tokenizer, axes), 4096)
    texts = [tiny_tokenizer.decode(row["flipped_input_ids"]) for row in encoded]
    for text, other in zip(texts, ("literary", "concise", "objective"), strict=True):
        assert f"Requirement: {other}." in text


# ---- files


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (json.dumps([BASIC]).encode("utf-16"), ["(it looks like UTF-16)", "iconv -f UTF-16 -t UTF-8"]),
        ('[{"instruction": "要求：文学诗意。"}]'.encode("gbk"), ["looks like GB18030", "iconv -f GB18030"]),
        (b'[{"instruction": "caf\xe9", "output": "x"}]', ["is not UTF-8 text", "convert it"]),
        (json.dumps({"data": [BASIC]}, indent=1).encode(), ["one object with the keys 'data'", "stand under 'data'"]),
        (json.dumps(BASIC, indent=1).encode(), ["one object with the keys 'instruction'", "one record on each line"]),
        (b'[{"output": "a"}, {"output": "b", "output": "c"}]', ["record 2: the key 'output' stands twice"]),
        (b'{"output": "a"}\n{"output": "b", "output": "c"}', ["record 2: the key 'output' stands twice"]),
        (b'[{"output": "a"}, {"output": "\\ud83d b"}]', ["record 2: ", "U+D83D", "lone surrogate"]),
    ],
    ids=["utf-16", "gbk", "latin-1", "data object", "one object", "doubled key", "doubled key in lines", "surrogate"],
)
def test_a_file_that_cannot_be_read_says_what_it_is_and_what_to_do(tmp_path, content, parts):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(TKPOError) as error:
        load_records(str(path))
    (fault,) = check([path])[1]
    for part in (str(path), *parts):
        assert part in str(error.value) and part in fault


def test_an_emoji_of_two_surrogates_is_a_character(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"instruction": "literary \\ud83c\\udf75", "output": "1. A"}]', encoding="utf-8")
    assert load_records(str(path))[0]["instruction"] == "literary 🍵"


def test_the_cases_read_alike_by_all(tmp_path, tiny_tokenizer, caplog):
    """Every good case file: checked, loaded, annotated and encoded, with as many records each time."""
    caplog.set_level(logging.WARNING)
    flipper = PromptFlipper(tiny_tokenizer, AXIS)
    for path in sorted(CASES.glob("*.json")):
        if path.stem == "wrong-attribute":
            continue
        count, faults = check([path])
        rows = json.loads(path.read_text(encoding="utf-8"))
        assert (count, faults) == (len(rows), []), path
        assert len(load_records(str(path), axes=AXIS)) == len(rows)
        assert len(encode_dataset(rows, tiny_tokenizer, flipper, 16384)) == len(rows)
    assert not caplog.records
