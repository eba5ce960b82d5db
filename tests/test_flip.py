"""The flip on token ids, held against retokenised text."""

import json
from pathlib import Path

import pytest
import torch

from tkpo.attributes import get_axes, get_axis
from tkpo.data import arrange, make_record, user_message
from tkpo.errors import TKPOError
from tkpo.flip import PromptFlipper
from tkpo.loss import IGNORE_INDEX

PHRASE_IDS = {  # as published
    "文学诗意": [104179, 117599],
    "真实客观": [100267, 105310],
    "详细全面": [100700, 100011],
    "简洁关键": [110485, 99936],
}
WORDS = {
    "literary": {"en": "literary", "zh": "文学诗意"},
    "objective": {"en": "objective", "zh": "真实客观"},
    "comprehensive": {"en": "comprehensive", "zh": "详细全面"},
    "concise": {"en": "concise", "zh": "简洁关键"},
}
FLIPS = [
    ("language_style", "literary", "objective"),
    ("language_style", "objective", "literary"),
    ("level_of_detail", "comprehensive", "concise"),
    ("level_of_detail", "concise", "objective"),
    ("level_of_detail", "objective", "concise"),
]
ARTICLES = {
    "zh": "这不是一篇文学诗意的散文，也不求真实客观；它详细全面，又简洁关键。",
    "en": "A literary prize needs an objective jury, a comprehensive list and a concise speech.",
}

TONE = """
attributes:
  formal: {en: formal, zh: 正式规范}
  casual: {en: casual and friendly, zh: 轻松随意不拘一格}
axes:
  tone: {formal: casual, casual: formal}
"""


@pytest.fixture(params=["qwen", "tiny"])
def tokenizer(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


def chat(tokenizer, text):
    """Token ids of `text` as a user's message in the chat template."""
    messages = [{"role": "user", "content": text}]
    return encode(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def flip(tokenizer, axis, text):
    """The user's message `text`, flipped as tokens in the chat template."""
    ids = chat(tokenizer, text)
    before = list(ids)
    flipped = PromptFlipper(tokenizer, axis).flip_ids(ids, len(ids))
    assert ids == before
    return flipped


def contains(ids, part):
    return any(ids[i : i + len(part)] == part for i in range(len(ids)))


# ---- prompts of the data sets


def test_chinese_phrases_have_the_published_ids(qwen_tokenizer):
    assert {phrase: encode(qwen_tokenizer, phrase) for phrase in PHRASE_IDS} == PHRASE_IDS


@pytest.mark.parametrize(("axis", "attribute", "other"), FLIPS)
def test_published_chinese_records_swap_exactly_the_published_ids(qwen_tokenizer, axis, attribute, other):
    instruction = f"对如下给定文档生成结构化层次化目录。要求：{WORDS[attribute]['zh']}。输入：\n"
    record = {"instruction": instruction, "input": "春天来了，花开了。", "output": "一、花"}
    ids = chat(qwen_tokenizer, user_message(record))
    old, new = PHRASE_IDS[WORDS[attribute]["zh"]], PHRASE_IDS[WORDS[other]["zh"]]
    start = next(i for i in range(len(ids)) if ids[i : i + 2] == old)
    flipped = PromptFlipper(qwen_tokenizer, get_axis(axis)).flip_ids(ids, len(ids))
    assert flipped == ids[:start] + new + ids[start + 2 :]


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("article", [True, False], ids=["article", "topic"])
@pytest.mark.parametrize(("axis_name", "attribute", "other"), FLIPS)
def test_flipped_tokens_are_the_tokens_of_the_flipped_text(tokenizer, axis_name, attribute, other, lang, article):
    """Articles name every attribute; only the instruction's changes."""
    axis = get_axis(axis_name)
    record = make_record(axis, attribute, "海 sea", ARTICLES[lang] if article else None, lang)
    text = user_message(record)
    flipped = flip(tokenizer, axis, text)
    assert flipped == chat(tokenizer, axis.flip_text(text)[0])
    assert flipped == chat(tokenizer, text.replace(WORDS[attribute][lang], WORDS[other][lang], 1))
    assert flipped != chat(tokenizer, text)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_instruction_wins_over_an_article_that_comes_first(tokenizer, lang):
    axis = get_axis("language_style")
    instruction = axis.instruction("objective", lang)
    other = axis.instruction("literary", lang)
    text = f"{ARTICLES[lang]}\n\n{instruction}"
    assert flip(tokenizer, axis, text) == chat(tokenizer, f"{ARTICLES[lang]}\n\n{other}")


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("article", [True, False], ids=["article", "topic"])
@pytest.mark.parametrize(("axis_name", "attribute", "other"), FLIPS)
def test_an_instruction_after_the_article_flips_there(tokenizer, axis_name, attribute, other, lang, article):
    """The article names every attribute, and even quotes the instruction that may stand before an article."""
    axis = get_axis(axis_name)
    document = ARTICLES[lang] + "\n" + axis.instruction(other, lang) + ARTICLES[lang]
    records = [
        arrange(make_record(axis, asked, "海 sea", document if article else None, lang), axis, "article_first")
        for asked in (attribute, other)
    ]
    ids, wanted = (chat(tokenizer, user_message(r)) for r in records)
    flipped = flip(tokenizer, axis, user_message(records[0]))
    assert flipped == wanted != ids
    assert contains(ids, encode(tokenizer, records[0]["input"])[:-1])


@pytest.mark.parametrize(("axis", "attribute", "other"), FLIPS)
def test_the_instruction_after_the_article_keeps_the_published_ids(qwen_tokenizer, axis, attribute, other):
    table = get_axis(axis)
    record = arrange(make_record(table, attribute, "春", "春天来了，花开了。"), table, "article_first")
    ids = chat(qwen_tokenizer, user_message(record))
    old, new = PHRASE_IDS[WORDS[attribute]["zh"]], PHRASE_IDS[WORDS[other]["zh"]]
    (start,) = [i for i in range(len(ids)) if ids[i : i + 2] == old]
    assert PromptFlipper(qwen_tokenizer, table).flip_ids(ids, len(ids)) == ids[:start] + new + ids[start + 2 :]


def test_with_several_axes_each_prompt_flips_on_its_own(tokenizer):
    axes = get_axes("language_style,level_of_detail")
    flipper = PromptFlipper(tokenizer, axes)
    for name, attribute, other in FLIPS:
        ids, wanted = (
            chat(tokenizer, user_message(make_record(axes[name], asked, "sea", ARTICLES["en"])))
            for asked in (attribute, other)
        )
        assert flipper.flip_ids(ids, len(ids), axis=name) == wanted
    ids = chat(tokenizer, "Be concise.")
    assert flipper.flip_ids(ids, len(ids)) == chat(tokenizer, "Be objective.")
    with pytest.raises(TKPOError, match=r"s1: no attribute phrase of axis language_style \("):
        flipper.flip_ids(ids, len(ids), "s1", "language_style")
    with pytest.raises(TKPOError, match=r"of axis language_style, level_of_detail \("):
        flipper.flip_ids(encode(tokenizer, "Be kind."), 3)


@pytest.mark.parametrize("ending", [" ", ", please.", "; numbered.\n", "!"])
def test_the_instruction_may_go_on_otherwise_after_the_phrase(tokenizer, ending):
    text = "A literary prize. Generate a structured hierarchical outline. Requirement: {}" + ending
    flipped = flip(tokenizer, get_axis("language_style"), text.format("objective"))
    assert flipped == chat(tokenizer, text.format("literary"))


# ---- the user's own words


@pytest.mark.parametrize(
    ("axis", "text", "expected"),
    [
        ("language_style", "Make it literary!", "Make it objective!"),
        ("language_style", "literary, with an objective end", "literary, with an literary end"),
        ("language_style", "Objective tone, not poetry.", "Literary tone, not poetry."),
        ("level_of_detail", "An outline that is concise, please.", "An outline that is objective, please."),
        ("level_of_detail", "Be comprehensive, not concise.", "Be comprehensive, not objective."),
        ("language_style", "请写一份文学诗意的目录", "请写一份真实客观的目录"),
        ("language_style", "写得真实客观些，不要文学诗意", "写得真实客观些，不要真实客观"),
    ],
)
def test_other_instructions_are_matched_at_the_last_phrase(tokenizer, axis, text, expected):
    assert flip(tokenizer, get_axis(axis), text) == chat(tokenizer, expected)


def test_longer_words_are_left_alone(qwen_tokenizer):
    axis = get_axis("level_of_detail")
    text = "Value conciseness, judge objectively: {}."
    assert flip(qwen_tokenizer, axis, text.format("concise")) == chat(qwen_tokenizer, text.format("objective"))


def test_a_prompt_without_phrase_is_an_error_that_names_the_sample(tokenizer):
    flipper = PromptFlipper(tokenizer, get_axis("language_style"))
    ids = chat(tokenizer, "Write a funny outline.")
    with pytest.raises(TKPOError) as error:
        flipper.flip_ids(ids, len(ids), "record 7 (sea-1)")
    for part in ("record 7 (sea-1)", "language_style", "literary", "objective", "文学诗意", "真实客观"):
        assert part in str(error.value)
    assert "comprehensive" not in str(error.value)


def test_phrases_of_another_axis_do_not_count(tokenizer):
    record = make_record(get_axis("level_of_detail"), "concise", "sea", None, "en")
    with pytest.raises(TKPOError, match="no attribute phrase"):
        flip(tokenizer, get_axis("language_style"), user_message(record))


def test_the_response_is_not_searched_and_not_changed(tokenizer):
    flipper = PromptFlipper(tokenizer, get_axis("language_style"))
    response = encode(tokenizer, "I. An objective, literary view. Requirement: literary.")
    prompt = chat(tokenizer, "Make it literary!")
    expected = chat(tokenizer, "Make it objective!") + response
    assert flipper.flip_ids(prompt + response, len(prompt)) == expected
    bare = chat(tokenizer, "Make it funny!")
    with pytest.raises(TKPOError):
        flipper.flip_ids(bare + response, len(bare))


# ---- an axis of one's own


@pytest.fixture
def tone(tmp_path):
    path = tmp_path / "axes.yaml"
    path.write_text(TONE, encoding="utf-8")
    return get_axis("tone", path)


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("attribute", ["formal", "casual"])
def test_own_axis_with_phrases_of_different_token_lengths(tokenizer, tone, lang, attribute):
    text = user_message(make_record(tone, attribute, "the sea", None, lang))
    flipped = flip(tokenizer, tone, text)
    assert len(flipped) != len(chat(tokenizer, text))
    assert flipped == chat(tokenizer, tone.flip_text(text)[0])
    back = PromptFlipper(tokenizer, tone).flip_ids(flipped, len(flipped))
    assert back == chat(tokenizer, text)  # with two attributes, two flips are none


def test_a_phrase_that_the_tokenizer_merges_with_its_neighbours_is_flipped(tokenizer, qwen_tokenizer, tmp_path):
    path = tmp_path / "axes.yaml"
    path.write_text('instruction: {en: "Outline, tone({attribute})."}\n' + TONE, encoding="utf-8")
    axis = get_axis("tone", path)
    assert "(form" in qwen_tokenizer.decode(encode(qwen_tokenizer, "tone(formal)")[1])  # one token: "(form"
    for text in ("Outline, tone(formal).", "Outline, tone(Formal).\nA casual and friendly sea.", "tone[formal]"):
        assert flip(tokenizer, axis, text) == chat(tokenizer, axis.flip_text(text)[0])


CASES = json.loads((Path(__file__).parent / "cases" / "attribute-forms.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("record", CASES, ids=[case["instruction"].strip() for case in CASES])
def test_the_attribute_flips_in_every_form_it_is_written_in(tokenizer, record):
    swap = {"Literary": "Objective", "LITERARY": "OBJECTIVE", "literary": "objective", "文学诗意": "真实客观"}
    old = next(word for word in swap if word in record["instruction"])
    text = user_message(record)
    assert flip(tokenizer, get_axis("language_style"), text) == chat(tokenizer, text.replace(old, swap[old], 1))


@pytest.mark.parametrize("text", ["Be literary.", "[literary]", "要求：文学诗意。", "A jury.\nliterary"])
def test_tokens_that_are_not_the_tokenizers_own_are_flipped_in_place(qwen_tokenizer, text):
    """A prompt split into other tokens, as after a prefix that was read before: only the phrase's own change."""
    axis = get_axis("language_style")
    start = encode(qwen_tokenizer, "ou") + encode(qwen_tokenizer, "tline ")  # "outline" in two other tokens
    assert start != encode(qwen_tokenizer, "outline ")
    ids = start + encode(qwen_tokenizer, text)
    flipped = PromptFlipper(qwen_tokenizer, axis).flip_ids(ids, len(ids))
    assert flipped[: len(start)] == start
    assert qwen_tokenizer.decode(flipped) == "outline " + axis.flip_text(text)[0]


def test_of_several_turns_the_last_with_a_phrase_is_flipped(tokenizer):
    """Two responses, both with labels: the attribute may stand in any of the user's turns."""
    flipper = PromptFlipper(tokenizer, get_axis("language_style"))
    turns = [("Be objective.", "1. A literary A"), ("Be literary!", "1. B"), ("Again, longer.", "1. C")]

    def row(asked):
        ids, labels = [], []
        for question, (_, answer) in zip(asked, turns, strict=True):
            for text, trained in ((question, False), (answer, True)):
                part = encode(tokenizer, text + "\n")
                ids += part
                labels += part if trained else [IGNORE_INDEX] * len(part)
        return ids, labels

    asked = [question for question, _ in turns]
    assert flipper.flip_row(*row(asked)) == row([asked[0], "Be objective!", asked[2]])
    assert flipper.flip_row(*row([asked[0], "More.", asked[2]])) == row(["Be literary.", "More.", asked[2]])
    with pytest.raises(TKPOError, match="r9: no attribute phrase"):
        flipper.flip_row(*row(["Hello.", "More.", "Again."]), "r9")


# ---- batches


def padded(rows, pad_id, side):
    """(ids, labels) lists → input_ids, labels, attention_mask, padded on one side."""
    width = max(len(ids) for ids, _ in rows)
    columns = []
    for ids, labels in rows:
        fill = width - len(ids)
        parts = [(ids, pad_id), (labels, IGNORE_INDEX), ([1] * len(ids), 0)]
        columns.append([[x] * fill + own if side == "left" else own + [x] * fill for own, x in parts])
    return [torch.tensor(column) for column in zip(*columns, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_flip_batch_keeps_labels_on_the_response_tokens(tiny_tokenizer, samples, side):
    """In bytes "literary" has 8 tokens and "objective" 9: some rows grow, some shrink."""
    rows = [sample.row() for sample in samples]
    ids, labels, mask = padded(rows, tiny_tokenizer.pad_token_id, side)
    given = [x.clone() for x in (ids, labels, mask)]
    flipper = PromptFlipper(tiny_tokenizer, get_axis("language_style"))
    flipped_ids, flipped_mask, flipped_labels = flipper.flip_batch(ids, labels, mask)
    assert all(torch.equal(a, b) for a, b in zip(given, (ids, labels, mask), strict=True))
    expected = padded([s.row(flip=True) for s in samples], tiny_tokenizer.pad_token_id, "right")
    assert torch.equal(flipped_ids, expected[0])
    assert torch.equal(flipped_labels, expected[1])
    assert torch.equal(flipped_mask, expected[2])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_flip_batch_with_phrases_of_different_lengths(qwen_tokenizer, tone, side, lang):
    rows, expected = [], []
    for attribute, other, topic, response in (
        ("formal", "casual", "the sea", "I. Salt"),
        ("casual", "formal", "bread and butter and all that", "一、面粉"),
    ):
        response = encode(qwen_tokenizer, response)
        for target, asked in ((rows, attribute), (expected, other)):
            start = chat(qwen_tokenizer, user_message(make_record(tone, asked, topic, None, lang)))
            target.append((start + response, [IGNORE_INDEX] * len(start) + response))
    ids, labels, mask = padded(rows, qwen_tokenizer.pad_token_id, side)
    result = PromptFlipper(qwen_tokenizer, tone).flip_batch(ids, labels, mask)
    wanted_ids, wanted_labels, wanted_mask = padded(expected, qwen_tokenizer.pad_token_id, "right")
    for found, wanted in zip(result, (wanted_ids, wanted_mask, wanted_labels), strict=True):
        assert found.tolist() == wanted.tolist()


def test_flip_batch_without_attention_mask_takes_every_token(tiny_tokenizer, samples):
    ids, labels = (torch.tensor([part]) for part in samples[0].row())
    result = PromptFlipper(tiny_tokenizer, get_axis("language_style")).flip_batch(ids, labels)
    wanted_ids, wanted_labels = samples[0].row(flip=True)
    assert [x.tolist() for x in result] == [[wanted_ids], [[1] * len(wanted_ids)], [wanted_labels]]


def test_flip_batch_keeps_gaps_inside_the_response(tiny_tokenizer, samples):
    """As in a dialogue of several turns: only some tokens after the prompt have labels."""
    ids, labels = samples[1].row()
    flipped_ids, flipped_labels = samples[1].row(flip=True)
    for row in (labels, flipped_labels):
        row[-4:-2] = [IGNORE_INDEX] * 2
    flipper = PromptFlipper(tiny_tokenizer, get_axis("language_style"))
    result = flipper.flip_batch(torch.tensor([ids]), torch.tensor([labels]))
    assert result[0].tolist() == [flipped_ids] and result[2].tolist() == [flipped_labels]


def test_flip_batch_passes_a_row_without_response_through(tiny_tokenizer, samples):
    ids, labels = samples[0].row()
    bare = encode(tiny_tokenizer, "no phrase here")
    batch = padded([(bare, [IGNORE_INDEX] * len(bare)), (ids, labels)], tiny_tokenizer.pad_token_id, "left")
    flipper = PromptFlipper(tiny_tokenizer, get_axis("language_style"))
    found_ids, mask, found_labels = flipper.flip_batch(*batch)
    assert found_ids[0][mask[0].bool()].tolist() == bare
    assert (found_labels[0] == IGNORE_INDEX).all()
    assert found_ids[1].tolist() == samples[0].row(flip=True)[0]


def test_flip_batch_names_the_row_without_phrase(tiny_tokenizer, samples):
    bare = encode(tiny_tokenizer, "no phrase here")
    rows = [samples[0].row(), (bare, [IGNORE_INDEX] * (len(bare) - 1) + bare[-1:])]
    batch = padded(rows, tiny_tokenizer.pad_token_id, "right")
    with pytest.raises(TKPOError, match="row 1 of the batch"):
        PromptFlipper(tiny_tokenizer, get_axis("language_style")).flip_batch(*batch)
