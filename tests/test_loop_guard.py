"""The loop guard: outlines written by hand, a rule-made model that tempts it, and the corpus, which it must let be."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outline_writer import WORDS, OutlineWriter

from tkpo.loop_guard import LoopGuard
from tkpo.outline import is_valid, parse
from tkpo.presets import load_tokenizer
from tkpo.sampling import Decoding, Pick

CORPUS = Path(__file__).parents[1] / "data" / "corpus"
TOKENIZERS = {name: load_tokenizer(name) for name in ("tiny", "qwen2.5-coder-0.5b")}
GUARDS = {name: LoopGuard(tokenizer) for name, tokenizer in TOKENIZERS.items()}
QWEN, GUARD = TOKENIZERS["qwen2.5-coder-0.5b"], GUARDS["qwen2.5-coder-0.5b"]


def stopped(outline):
    """The tokens of `outline` that the guard would not let through, as (token, what is written instead or None)."""
    state, found = GUARD.outline(), []
    for token in QWEN(outline)["input_ids"]:
        if token in state.banned():
            found.append((QWEN.decode([token]), None))
        elif (instead := state.settle(token)) != token:
            found.append((QWEN.decode([token]), QWEN.decode([instead])))
        state.add(token)
    return found


@pytest.mark.parametrize(
    ("outline", "found"),
    [
        ("1. Safety tips\n2. Safety tips\n", [(" tips", None)]),
        ("1. Safety tips\n2. SAFETY tips\n", [(" tips", None)]),
        ("12. Safety, tips\n13. Safety tips\n", [(" tips", None)]),
        ("1. A hut\n   1.1 Safety tips\n   1.2 Safety tips\n", [(" tips", None)]),
        ("1. Salt\n2. Salt\n", [(" Salt", None)]),
        ("1. 盐的历史\n2. 运输\n3. 盐的历史\n", [("的历史", None)]),
        ("1. 古城𠮷野\n2. 古城𠮷野\n", [("野", None)]),
        ("1. Safety tips\n2. Safety first\n", []),
        ("1. Safety tips\n2. Other safety tips\n", []),
        ("1. Founded in 1984\n2. Founded in 1990\n", []),  # digits are never banned
        ("1. 1984\n2. 1984\n", []),
        ("1. A well-known\n2. A well-known\n", [(" well", None)]),  # a word is kept out by its first token
        ("1. Salt\nSalt\n", []),  # a line without number is no heading
        ("1. Salt", []),
        ("1. the sea the sea the sea the sea", [(" the", "\n"), (" sea", "\n")]),
        ("1. the sea the sea the season", []),
        ("1. the sea the sea the sea\n2. A", []),
        ("1. the sea the sea the sea's\n2. A", []),
    ],
)
def test_what_it_stops(outline, found):
    assert stopped(outline) == found


def test_a_looping_outline_ends_at_the_end_of_a_line():
    lines = ["1. A river never sleeps", "2. A river never rains", "3. A river never grows", "4. A river never ends"]
    assert stopped("\n".join(lines[:3]) + "\n4.") == []
    assert stopped("\n".join(lines) + "\n5.") == [("5", QWEN.eos_token)]
    varied = [
        "1. Salt",
        "2. Roads across sand",
        "3. A tax",
        "4. Winter",
        *(f"{n}. A river never {n}x" for n in (5, 6, 7)),
    ]
    assert stopped("\n".join(varied) + "\n8. More") == []  # two of seven repeat


def test_the_corpus_outlines_pass_untouched():
    """All but a few in a thousand: real outlines do hardly repeat themselves."""
    outlines = [
        text
        for file in sorted(CORPUS.glob("*.jsonl"))
        for line in file.open(encoding="utf-8")
        for text in json.loads(line)["outlines"].values()
    ]
    touched = [text for text in outlines[::5] if stopped(text)]
    assert len(outlines[::5]) > 400 and len(touched) <= len(outlines[::5]) / 200


# ---- a model that always numbers rightly and tempts the guard


def write(name, seed, lang, guard, temperature=0.0, tokens=500, **shape):
    """Text by an OutlineWriter, as tokens."""
    tokenizer, ids = TOKENIZERS[name], []
    writer = OutlineWriter(tokenizer, seed, lang, **shape)
    options = Decoding(guard=guard, temperature=temperature, seed=1, max_new_tokens=tokens)
    pick = Pick(GUARDS[name], [0], options, lambda step: None)
    while len(ids) < tokens:
        (token,) = pick(writer.logits(ids, len(tokenizer) + 300)[None], [0])
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return ids


def segments(heading, lang):
    """Whether a heading is made of the writer's whole words."""
    words = sorted((re.escape(word.strip()) for word in WORDS[lang]), key=len, reverse=True)
    return re.fullmatch(rf"(?:{'|'.join(words)})(?:{' ' if lang == 'en' else ''}(?:{'|'.join(words)}))*", heading)


shapes = st.fixed_dictionaries({"length": st.integers(1, 12), "headings": st.integers(1, 15)})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), shape=shapes)
def test_guarded_outlines_are_numbered_rightly_and_made_of_whole_words(name, lang, temperature, seed, shape):
    tokenizer = TOKENIZERS[name]
    plain, guarded = (write(name, seed, lang, guard, temperature, **shape) for guard in ("none", "structure"))
    assert is_valid(tokenizer.decode(plain)) or len(plain) == 500
    if len(plain) < 500 and len(guarded) < 500:
        outline = parse(tokenizer.decode(guarded))
        headings = [h for top, sub in zip(outline.headings, outline.sub_headings, strict=True) for h in (top, *sub)]
        assert all(segments(heading, lang) for heading in headings)
    shared = next((i for i, (a, b) in enumerate(zip(plain, guarded, strict=False)) if a != b), len(guarded))
    assert plain[:shared] == guarded[:shared]


def test_the_tempting_model_does_tempt():
    """The property above would say nothing about a guard that never acts."""
    pairs = [
        [write("qwen2.5-coder-0.5b", seed, "en", g, length=2) for g in ("none", "structure")] for seed in range(20)
    ]
    assert sum(plain != guarded for plain, guarded in pairs) >= 15
    ended = [guarded for plain, guarded in pairs if guarded == plain[: len(guarded)] and guarded != plain]
    other = [guarded for plain, guarded in pairs if guarded != plain[: len(guarded)]]
    assert ended or other
    assert all(QWEN.decode(guarded).endswith("\n") for guarded in ended)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_it_bans_only_tokens_that_begin_a_word(data):
    """Whatever the tokens, also such as no outline has: no digit, mark, line break, end or part of a word is banned."""
    pool = [
        t
        for text in ("1. Salt and 𠮷盐", "\n   1.1 wellness", "2. 历史", ".\n\n", "…", " 19")
        for t in QWEN(text)["input_ids"]
    ]
    ids = data.draw(st.lists(st.sampled_from([*pool, QWEN.eos_token_id]), max_size=40))
    state = GUARD.outline()
    for token in ids:
        text = QWEN.decode(state._line)
        for banned in state.banned():
            piece = QWEN.decode([banned])
            assert not text.endswith("\ufffd") and "\n" not in piece and banned != QWEN.eos_token_id
            first = QWEN.decode([*state._line, banned])[len(text) :].strip()[:1]
            assert first.isalpha() or first == "\ufffd"
            assert piece.startswith(" ") or text[-1:].isspace() or not first.isascii()
        instead = state.settle(token)
        assert instead in (token, QWEN.eos_token_id, QWEN("\n")["input_ids"][0])
        state.add(token)


def test_no_stored_outline_has_a_numbering_fault_by_the_guard_alone():
    """What `paper/loop_guard.py` stored is by this guard, and its counts follow from the outlines beside them."""
    stored = json.loads((CORPUS.parents[1] / "paper" / "results" / "loop_guard.json").read_text(encoding="utf-8"))
    valid = {name: [is_valid(row[name]["outline"]) for row in stored["outlines"]] for name in ("none", "structure")}
    assert stored["settings"]["guard"] == LoopGuard.name and len(valid["none"]) == stored["counts"]["prompts"] == 24
    assert all(guarded for plain, guarded in zip(valid["none"], valid["structure"], strict=True) if plain)
    assert stored["counts"]["faults"] == {name: fine.count(False) for name, fine in valid.items()}
    changed = sum(row["none"]["outline"] != row["structure"]["outline"] for row in stored["outlines"])
    assert stored["counts"]["changed"] == changed > 5
