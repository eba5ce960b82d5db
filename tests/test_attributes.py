"""Attributes, flips and axes tables: the shipped one says what the method says, a broken one says what is wrong."""

import pytest
import yaml

from tkpo.attributes import DEFAULT_TABLE, axis_of, detect_language, get_axis, load_axes
from tkpo.errors import TKPOError

PUBLISHED_ZH = "对如下给定文档生成结构化层次化目录。要求：{}。输入：\n"
CHINESE = {"literary": "文学诗意", "objective": "真实客观", "comprehensive": "详细全面", "concise": "简洁关键"}
FLIPS = {
    "language_style": {"literary": "objective", "objective": "literary"},
    "level_of_detail": {"comprehensive": "concise", "concise": "objective", "objective": "concise"},
}


def write(folder, text):
    path = folder / "axes.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- the shipped table


def test_the_two_axes_and_their_flips():
    assert {name: axis.flip for name, axis in load_axes().items()} == FLIPS


@pytest.mark.parametrize("name", FLIPS)
def test_instructions_ask_with_the_published_chinese_words(name):
    axis = get_axis(name)
    assert axis.attributes == tuple(FLIPS[name])
    for attribute in axis.attributes:
        assert axis.instruction(attribute, "zh") == PUBLISHED_ZH.format(CHINESE[attribute])
        english = axis.instruction(attribute, "en")
        assert f" {attribute}." in english and english.endswith("Input:\n") and "{" not in english


@pytest.mark.parametrize(
    ("name", "attribute", "other"), [(name, *flip) for name, table in FLIPS.items() for flip in table.items()]
)
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_flipped_instruction_is_the_instruction_of_the_other_attribute(name, attribute, other, lang):
    axis = get_axis(name)
    assert axis.flip_text(axis.instruction(attribute, lang)) == (axis.instruction(other, lang), attribute, other)


def test_an_attribute_belongs_to_the_first_axis_that_has_it():
    assert axis_of("objective").name == "language_style"
    assert axis_of("concise").name == "level_of_detail"


def test_unknown_names_list_what_there_is():
    with pytest.raises(TKPOError, match="language_style, level_of_detail"):
        get_axis("mood")
    with pytest.raises(TKPOError, match="literary, objective, comprehensive, concise"):
        axis_of("casual")
    with pytest.raises(TKPOError, match=r"'concise'.*literary, objective"):
        get_axis("language_style").instruction("concise", "en")
    with pytest.raises(TKPOError, match="'fr'"):
        get_axis("language_style").instruction("literary", "fr")


# ---- finding and flipping in text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Please be OBJECTIVE.", ("objective", "en")),
        ("Literary, not objective", ("objective", "en")),
        ("objective, not literary", ("literary", "en")),
        ("要求：文学诗意。", ("literary", "zh")),
        ("写得真实客观一些，不要文学诗意", ("literary", "zh")),
        ("先literary，后真实客观", ("objective", "zh")),  # "先literary" is one run of letters
        ("an objective 文学诗意", ("literary", "zh")),
        ("an unobjective view", None),
        ("objectives and objectively", None),
        ("a non-literary text", ("literary", "en")),
        ("concise", None),  # of another axis
        ("", None),
    ],
)
def test_find_takes_the_last_whole_word_in_any_case(text, found):
    assert get_axis("language_style").find(text) == found


@pytest.mark.parametrize(
    ("text", "flipped"),
    [
        ("be objective, be Objective", "be objective, be Literary"),
        ("a literary, objective and unobjective text", "a literary, literary and unobjective text"),
        ("要求：真实客观。真实客观", "要求：文学诗意。真实客观"),  # in the instruction's place
        ("Be OBJECTIVE", "Be LITERARY"),
        ("Requirement: objective\nTopic: a literary prize", "Requirement: literary\nTopic: a literary prize"),
    ],
)
def test_only_one_phrase_is_flipped(text, flipped):
    assert get_axis("language_style").flip_text(text)[0] == flipped


def test_text_without_a_phrase_cannot_be_flipped():
    with pytest.raises(TKPOError) as error:
        get_axis("level_of_detail").flip_text("Write a haiku, unconcisely.")
    for part in ("level_of_detail", "comprehensive", "concise", "详细全面", "简洁关键", "Write a haiku"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "Requirement: Literary.",
        "Requirement:literary",
        "REQUIREMENT: [literary]",
        "Requirement:\n\tliterary.",
        "要求： 文学诗意 。",
        "要求：【文学诗意】",
        "Objective facts. Requirement: literary. Objective, objective!",
        "An objective jury sat.\n\nGenerate a structured hierarchical outline of the above. Requirement: literary.",
        "Requirement: objective.\nGenerate a structured hierarchical outline of the above. Requirement: literary.",
    ],
)
def test_the_phrase_in_the_instructions_place_wins_over_others(text):
    found = get_axis("language_style").locate(text)
    assert found.attribute == "literary"
    assert text[found.start : found.end].casefold() in ("literary", "文学诗意")


def test_a_word_that_ends_in_the_instructions_words_is_no_place(tmp_path):
    table = {"instruction": {"en": "Style {attribute}:"}, "axes": {"a": {"literary": "concise", "concise": "literary"}}}
    axis = get_axis("a", write(tmp_path, yaml.safe_dump(table)))
    assert axis.find("Lifestyle literary, style concise, literary") == ("concise", "en")


# ---- an axis of one's own

OWN = """
attributes:
  casual: {en: casual, zh: 轻松随意}
  formal: {en: casually formal, zh: 正式}
  dry: {en: casual and dry, zh: 枯燥}
axes:
  register: {casual: formal, formal: casual, dry: formal}
"""


def test_an_own_axis_keeps_the_shipped_instructions(tmp_path):
    axis = get_axis("register", write(tmp_path, OWN))
    assert axis.instruction("formal", "zh") == PUBLISHED_ZH.format("正式")
    assert axis.topics == get_axis("language_style").topics
    assert axis.flip_text(axis.instruction("dry", "en"))[1:] == ("dry", "formal")


def test_of_phrases_that_start_together_the_longest_is_meant(tmp_path):
    axis = get_axis("register", write(tmp_path, OWN))
    assert axis.find("casual and dry") == ("dry", "en")
    assert axis.find("casual and wry") == ("casual", "en")
    assert axis.flip_text("Be casual and dry.") == ("Be casually formal.", "dry", "formal")


def test_an_own_axis_may_use_shipped_attributes_and_own_words(tmp_path):
    table = {"instruction": {"en": "Style {attribute}:"}, "axes": {"a": {"literary": "concise", "concise": "literary"}}}
    axis = get_axis("a", write(tmp_path, yaml.safe_dump(table)))
    assert axis.instruction("literary", "en") == "Style literary:"
    assert axis.flip_text("要求：文学诗意")[0] == "要求：简洁关键"


def test_a_replacement_is_put_in_as_it_is(tmp_path):
    text = r"attributes: {a: {en: plain}, b: {en: '\1 \g<0>'}}" + "\naxes: {x: {a: b, b: a}}"
    assert get_axis("x", write(tmp_path, text)).flip_text("be plain")[0] == r"be \1 \g<0>"


# ---- broken tables

TWO = "attributes: {casual: {en: casual}, formal: {en: formal}}\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("axes: [", ["not valid YAML"]),
        ("", ["`axes`"]),
        ("- axes", ["`axes`"]),
        ("axes: [language_style]", ["`axes`"]),
        (TWO + "axes: {mood: {casual: casual}}", ["mood", "two attributes"]),
        (TWO + "axes: {mood: casual}", ["mood", "two attributes"]),
        (TWO + "axes: {mood: {casual: grim, grim: casual}}", ["mood", "'grim'", "`attributes`"]),
        (TWO + "axes: {mood: {casual: literary, formal: casual}}", ["mood", "'casual'", "'literary'"]),
        (TWO + "axes: {mood: {casual: casual, formal: casual}}", ["mood", "'casual'"]),
        (TWO + "axes: {mood: {casual: , formal: casual}}", ["mood", "'casual'", "None"]),
        ("attributes: {a: {en: x}, b: {zh: 乙}}\naxes: {mood: {a: b, b: a}}", ["'b'", "en", "'a'"]),
        ("attributes: {a: plain, b: {en: y}}\naxes: {mood: {a: b, b: a}}", ["'a'", "phrase"]),
        ("attributes: {a: {en: 5}, b: {en: y}}\naxes: {mood: {a: b, b: a}}", ["'a'", "phrase"]),
        ("attributes: {a: {}, b: {en: y}}\naxes: {mood: {a: b, b: a}}", ["'a'", "phrase"]),
        (TWO + "instruction: {en: Be good}\naxes: {mood: {casual: formal, formal: casual}}", ["'en'", "{attribute}"]),
        (
            TWO + "instruction: {zh: '{attribute}{attribute}'}\naxes: {mood: {casual: formal, formal: casual}}",
            ["'zh'", "{attribute}"],
        ),
        ("attributes: {a: {en: ''}, b: {en: y}}\naxes: {mood: {a: b, b: a}}", ["'a'"]),
        ("attributes: {a: {en: same}, b: {en: Same}}\naxes: {mood: {a: b, b: a}}", ["'a'", "'b'"]),
        (TWO + "topic: {en: no slot}\naxes: {mood: {casual: formal, formal: casual}}", ["'en'", "{topic}"]),
        (TWO + "instruction: {en: 5}\naxes: {mood: {casual: formal, formal: casual}}", ["'en'", "{attribute}"]),
        (TWO + "instruction: [x]\naxes: {mood: {casual: formal, formal: casual}}", ["instruction"]),
        ("attributes: [casual]\naxes: {mood: {casual: formal, formal: casual}}", ["attributes"]),
        (TWO + "axes: {mood: {casual: [formal], formal: casual}}", ["mood", "'casual'"]),
        (TWO + "axes: {}", ["`axes`"]),
    ],
)
def test_a_broken_table_names_the_file_and_the_entry(tmp_path, text, parts):
    path = write(tmp_path, text)
    with pytest.raises(TKPOError) as error:
        load_axes(path)
    for part in (str(path), *parts):
        assert part in str(error.value)


def test_a_table_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(TKPOError, match=r"none\.yaml"):
        load_axes(tmp_path / "none.yaml")
    with pytest.raises(TKPOError, match=str(tmp_path)):
        load_axes(tmp_path)


def test_a_table_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "axes.yaml"
    path.write_bytes(DEFAULT_TABLE.read_text(encoding="utf-8").encode("gbk"))
    with pytest.raises(TKPOError, match=r"axes\.yaml"):
        load_axes(path)


def test_phrases_may_end_in_punctuation(tmp_path):
    text = "attributes: {a: {en: C++}, b: {en: plain}}\naxes: {x: {a: b, b: a}}"
    assert get_axis("x", write(tmp_path, text)).flip_text("Write C++ only")[0] == "Write plain only"


# ---- language


@pytest.mark.parametrize(
    ("text", "lang"),
    [
        ("How moss drinks rain", "en"),
        ("古琴的声音", "zh"),
        ("用Python处理数据", "zh"),
        ("Chinese tea 茶", "en"),
        ("abcd字", "zh"),  # a fifth exactly
        ("abcde字", "en"),
        ("2024 — 100 % !!! 茶", "zh"),  # digits and marks are no letters
        ("🍵🍵🍵", "en"),
        ("🍵茶", "zh"),
        ("12:30", "en"),
        ("", "en"),
        ("Où est la bibliothèque", "en"),
        ("㐀㐁", "zh"),
    ],
)
def test_language_of_a_text(text, lang):
    assert detect_language(text) == lang
