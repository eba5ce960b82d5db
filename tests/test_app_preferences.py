"""Token preferences against a plain computation with transformers alone, in float64; and their HTML."""

import dataclasses
import html.parser
import json
import math
from pathlib import Path

import pytest
import torch

from app import render
from app.headline import headline
from app.jobs import Column, Update
from app.page import page_words
from app.preferences import NUM_REJECTS, TAU, token_preferences
from app.queries import Query
from app.tabs.paper import about, files, paper_page
from app.tokens import SHOWN_REJECTS, tokens
from app.verdicts import Verdict, repeats
from tkpo.attributes import get_axis
from tkpo.data import make_record, user_message
from tkpo.generation import OutlineGenerator
from tkpo.presets import load_model, load_tokenizer

AXIS = get_axis("language_style")
WORDS = page_words({})
EN = WORDS.say("en")
OUTLINE = "1. Salt & 海\n2. <b>Bread</b>"


@pytest.fixture(scope="module")
def generator():
    return OutlineGenerator("tiny", {}, "float32", "cpu")


@pytest.fixture(scope="module")
def result(generator):
    record = make_record(AXIS, "literary", "Salt", lang="en")
    return token_preferences(generator, record, AXIS, OUTLINE, "base", seed=3)


def plain(attribute):
    """(n, V) probabilities of the outline's tokens and the end of turn, by transformers in float64."""
    model, tokenizer = load_model("tiny", "float64", "cpu"), load_tokenizer("tiny")
    record = make_record(AXIS, attribute, "Salt", lang="en")
    chat = [{"role": "user", "content": user_message(record)}]
    prompt = tokenizer(
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    )["input_ids"]
    response = [*tokenizer(OUTLINE, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : -1].softmax(-1), response


def test_probabilities_and_rewards_are_those_of_the_method(result):
    p, response = plain("literary")
    q, _ = plain("objective")  # the flipped prompt, made from its record and not by the flipper
    tokens = result["tokens"]
    assert len(tokens) == len(response)
    tokenizer = load_tokenizer("tiny")
    ids = {}  # a reject's name → token id
    for i in range(len(tokenizer)):
        name = tokenizer.decode([i])
        ids[tokenizer.convert_ids_to_tokens(i) if "\ufffd" in name else name] = i
    rewards = []
    for t, (token, gold) in enumerate(zip(tokens, response, strict=True)):
        assert token["p"] == pytest.approx(p[t, gold].item(), rel=1e-4)
        assert token["p_flipped"] == pytest.approx(q[t, gold].item(), rel=1e-4)
        rejects = [ids[r["text"]] for r in token["rejects"]]
        assert len(set(rejects)) == NUM_REJECTS and gold not in rejects
        for r, v in zip(token["rejects"], rejects, strict=True):
            assert (r["p"], r["p_flipped"]) == pytest.approx((p[t, v].item(), q[t, v].item()), rel=1e-4)
        powers = [math.exp(p[t, v].item() / TAU) for v in (gold, *rejects)]
        rewards.append(powers[0] / sum(powers))
        assert token["reward"] == pytest.approx(rewards[-1], rel=1e-4)
    mean = sum(rewards) / len(rewards)
    assert result["mean_reward"] == pytest.approx(mean, rel=1e-4)
    assert result["preference"] == pytest.approx(-math.log(mean), rel=1e-4)
    cross_entropy = -sum(math.log(p[t, g]) for t, g in enumerate(response)) / len(response)
    assert result["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-4)
    assert (result["style"], result["flipped"], result["cut"]) == ("literary", "objective", 0)


def test_tokens_put_together_are_the_outline(result):
    assert "".join(token["text"] for token in result["tokens"][:-1]) == OUTLINE


def test_draws_follow_the_seed(generator):
    axis = get_axis("level_of_detail")
    record = make_record(axis, "concise", "Salt", lang="en")
    draw = lambda seed: token_preferences(generator, record, axis, "1. Salt", "base", seed)["tokens"][0]["rejects"]  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


def test_a_long_outline_is_cut_and_a_stopped_one_gives_nothing(generator):
    record = make_record(AXIS, "literary", "Salt", lang="en")
    cut = token_preferences(generator, record, AXIS, "x" * 30, "base", limit=20)
    assert len(cut["tokens"]) == 20 and cut["cut"] == 10
    assert token_preferences(generator, record, AXIS, "x", "base", should_stop=lambda: True) is None


# ---- HTML ----


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.attributes = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words += data


EVIL = "\"><img src=x onerror=alert(1)><script>alert(2)</script>'&lt;"


def test_nothing_that_was_typed_or_written_becomes_markup():
    query = Query(
        EVIL,
        EVIL,
        "literary",
        {"literary": AXIS},
        "en",
        0.0,
        0,
        160,
        {"tokens": 1, "limit": 1, "chars": 1, "rest": EVIL},
    )
    verdict = Verdict(1, 1, 9, False, None, False, "literary", 0.9, 2.2)
    column = Column(EVIL, "literary", f"1. {EVIL}\n   1.1 {EVIL}\n{EVIL}", verdict=verdict)
    parts = [
        render.board(EN, Update("done", columns=[column], query=query)),
        render.status(EN, Update("done", query=query)),
        render.refusal(EVIL),
    ]
    for part in parts:
        found = Tags(part)
        assert not {"img", "script"} & set(found.tags)
        assert not [name for name, _ in found.attributes if name.startswith("on")]
        assert "<script>alert(2)</script>" in found.words
    actions = dict(Tags(parts[0]).attributes)
    assert actions["data-text"] == column.text, "what is copied is what was written, character by character"


def test_identical_outlines_are_said_to_be_so():
    columns = [Column("sft", "literary", "1. A"), Column("dpo", "literary", "1. B"), Column("tkpo", "literary", "1. A")]
    assert "word for word: SFT, TKPO" in render.status(EN, Update("done", columns=columns))
    assert "word for word" not in render.status(EN, Update("writing", columns=columns))
    assert "word for word" not in render.status(EN, Update("done", columns=columns[:2]))


def test_tokens_carry_their_numbers(result):
    shown = tokens(EN, result, "en")
    found = Tags(shown)
    assert "script" not in found.tags
    data = [json.loads(value) for name, value in found.attributes if name == "data-token"]
    assert len(data) == len(result["tokens"])
    for (p, q, reward, rejects), token in zip(data, result["tokens"], strict=True):
        assert (p, q, reward) == pytest.approx((token["p"], token["p_flipped"], token["reward"]), rel=1e-3)
        assert len(rejects) == SHOWN_REJECTS
        assert min(q for _, _, q in rejects) >= max(r["p_flipped"] for r in token["rejects"][SHOWN_REJECTS:]) - 1e-4
    marks = Tags(shown[shown.index('class="tokens"') :])
    tabbable = [value for name, value in marks.attributes if name == "tabindex"]
    assert tabbable.count("0") == 1, "one stop for the Tab key, arrow keys within"


def test_each_figure_says_what_it_is(result):
    """On hover, on focus and to screen readers: each names the element that explains it."""
    for ui in ("en", "zh"):
        attributes = Tags(tokens(WORDS.say(ui), result, "en")).attributes
        described = [value for name, value in attributes if name == "aria-describedby"]
        assert len(described) == 4 and set(described) <= {value for name, value in attributes if name == "id"}


def test_an_outlines_lines_show_number_and_level():
    shown = render.outline("1. One\n   1.1 Sub\nno number")
    assert [v for n, v in Tags(shown).attributes if n == "class" and v.startswith("line")] == [
        "line top",
        "line sub",
        "line plain",
    ]
    assert Tags(shown).words == "1.One1.1Subno number"


def test_a_number_waits_for_its_words_while_an_outline_grows():
    growing = lambda text: Tags(render.outline(text, growing=True)).words  # noqa: E731
    assert growing("1. One\n2") == growing("1. One\n2. ") == growing("1. One\n   1.1") == "1.One"
    assert growing("1. One\n2. T") == "1.One2.T"
    assert Tags(render.outline("1. One\n2")).words == "1.One2", "what is finished is shown as it is"


def test_a_verdict_is_a_bar_with_its_number_and_a_loop_gets_no_praise():
    verdict = Verdict(4, 0, 20, True, True, False, "literary", 0.95, 2.94)
    query = Query("Salt", "", "literary", {"literary": AXIS}, "en", 0.0, 0, 160)

    def shown(v):
        return render.board(EN, Update("done", columns=[Column("sft", "literary", "1. A", verdict=v)], query=query))

    good = shown(verdict)
    assert 'aria-label="log-odds of the style asked for: +2.9"' in good and "level as asked" in good
    assert "inset-inline-start:50.0%;width:29.4%" in good, "five log-odds fill the half that the style is on"
    other = shown(dataclasses.replace(verdict, reads_as="objective", log_odds=-2.94, level=False))
    assert "inset-inline-start:20.6%;width:29.4%" in other and "level not as asked" in other
    loop = shown(dataclasses.replace(verdict, repeats=True))
    assert "repeats itself" in loop and "+2.9" not in loop and "reads as" not in loop


@pytest.mark.parametrize(
    ("text", "lang", "found"),
    [
        ("1. Salt in the sea\n2. Bread and its crust", "en", False),
        ("1. The salt trade\n2. The salt trade\n3. The salt trade.\n4. The Salt trade", "en", True),
        ("1. salt of the earth and salt of the earth and salt of the earth", "en", True),
        ("1. 盐的来历\n2. 盐的贸易", "zh", False),
        ("1. 盐的历史与盐的未来\n2. 盐的历史与盐的未来\n3. 盐的历史与盐的未来\n4. 盐的历史与盐的未来", "zh", True),
        ("", "en", False),
    ],
)
def test_loops_are_found(text, lang, found):
    assert repeats(text, lang) is found


@pytest.mark.parametrize("ui", ["en", "zh"])
def test_every_figure_and_table_says_how_to_read_it(ui):
    root = Path(__file__).parent.parent
    shown = [*files(root / "figures", (".png",)), *files(root / "paper" / "tables", (".md",))]
    assert shown and all(about(WORDS.say(ui), path) for path in shown)


def test_the_first_sentence_takes_its_numbers_from_the_tables(tmp_path):
    assert "%" not in headline(EN, tmp_path), "without tables it claims nothing"
    (tmp_path / "table3.csv").write_text("method,× DPO\nDPO (TRL),1.00\nTKPO,0.40\nTKPO,0.30\nTKPO (other),0.9\n")
    (tmp_path / "table2.csv").write_text(
        "method,control\nzero-shot,50.0\nzero-shot,40.0\nDPO,80.0 ± 1.0\nDPO,90.0\nTKPO,71 ± 9\nTKPO,77\nTKPO,\n"
    )
    assert "took 35 % of DPO's time" in headline(EN, tmp_path)
    assert "74 % read as the style asked for; with DPO 85 %, with the base model 45 %" in headline(EN, tmp_path)
    assert "35 %" in headline(WORDS.say("zh"), tmp_path)


def test_the_paper_tab_shows_what_is_there_or_how_to_make_it(tmp_path):
    assert "python paper/reproduce.py" in paper_page(EN, tmp_path)
    tables = tmp_path / "paper" / "tables"
    tables.mkdir(parents=True)
    (tables / "main.csv").write_text("never shown,beside\nits,Markdown\n")
    (tables / "main.md").write_text(
        "**Table 1. Main**\n\n| method | R-1 |\n| --- | ---: |\n| TKPO | 41.5 |\n\n<script>x</script>\n"
    )
    (tables / "cost.csv").write_text("method,seconds\nDPO,<b>2</b>\n")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "main_result.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    page = paper_page(WORDS.say("zh"), tmp_path)
    found = Tags(page)
    assert "python paper/reproduce.py" not in page and "script" not in found.tags
    assert "41.5" in found.words and "<b>2</b>" in found.words and "never shown" not in page
    assert "**" not in page and "Table 1. Main" in found.words
    assert ("alt", "Main result") in found.attributes
    assert "43.4" in found.words and "19.28 %" in found.words
