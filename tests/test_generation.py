"""Generation on the tiny preset with adapters made here; oracles are transformers' own generate and merged weights."""

import contextlib
import itertools
import threading

import pytest
import torch
from outline_writer import OutlineWriter
from random_adapters import random_adapter

from tkpo.attributes import get_axis
from tkpo.data import make_record, user_message
from tkpo.decoding import PackedDecoder
from tkpo.errors import TKPOError
from tkpo.generation import OutlineGenerator
from tkpo.loop_guard import GuardedOutline
from tkpo.outline import is_valid
from tkpo.presets import load_model, load_tokenizer
from tkpo.sampling import Pick

AXIS = get_axis("language_style")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: random_adapter(root / name, seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture(scope="module")
def generator(adapters):
    return OutlineGenerator("tiny", adapters, "float32", "cpu")


@pytest.fixture(scope="module")
def records():
    return [make_record(AXIS, "literary", "Salt"), make_record(AXIS, "objective", "A much longer topic, 和中文")]


def reference(record, adapter=None, tokens=24):
    """Greedy text of one record alone, by a merged model and transformers' generate, without our loop guard."""
    from peft import PeftModel

    model, tokenizer = load_model("tiny", "float32", "cpu"), load_tokenizer("tiny")
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    chat = [{"role": "user", "content": user_message(record)}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**batch, max_new_tokens=tokens, do_sample=False, no_repeat_ngram_size=0)
    return out[0, batch["input_ids"].shape[1] :].tolist()


def test_a_batch_of_mixed_adapters_writes_what_each_writes_alone(generator, adapters, records):
    names = ["one", "two", "base", "one"]
    rows = [records[0], records[0], records[1], records[1]]
    texts = generator.generate(rows, names, max_new_tokens=24, guard="none")
    for text, name, record in zip(texts, names, rows, strict=True):
        expected = generator.tokenizer.decode(reference(record, adapters.get(name)), skip_special_tokens=True)
        assert text == expected.strip()
    assert len({texts[0], texts[1]}) == 2, "the adapters should differ, or this test shows nothing"


def test_one_adapter_alone_takes_the_quick_way_to_the_same_text(generator, records):
    mixed = generator.generate([records[0]] * 2, ["two", "one"], max_new_tokens=16)[0]
    assert generator.generate([records[0]], "two", max_new_tokens=16) == [mixed]
    assert generator.generate([records[0]], ["two"], max_new_tokens=16) == [mixed]


def test_the_stream_grows_and_ends_with_the_whole(generator, records):
    steps = list(generator.stream(records, "one", max_new_tokens=12))
    assert len(steps) == 13  # one a token, and the whole
    for before, after in itertools.pairwise(steps[:-1]):
        assert all(b.startswith(a.rstrip("\ufffd")) for a, b in zip(before, after, strict=True))
    assert steps[-1] == generator.generate(records, "one", max_new_tokens=12)


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_each_yields_every_outline_once_whatever_the_batch(generator, records, batch_size):
    rows, names = records * 2, ["one", "two", "base", "one"]
    expected = generator.generate(rows, names, max_new_tokens=12)
    found = list(generator.each(rows, names, max_new_tokens=12, batch_size=batch_size))
    assert sorted(found) == list(enumerate(expected))
    stopped = list(generator.each(rows, names, max_new_tokens=12, batch_size=batch_size, should_stop=lambda: True))
    assert stopped == list(enumerate([""] * 4))


@pytest.fixture(scope="module")
def by_transformers(adapters):
    """The same generator by transformers and PEFT, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedDecoder, "fits", staticmethod(lambda model: False))
        made = OutlineGenerator("tiny", adapters, "float32", "cpu")
    assert not isinstance(made.decoder, PackedDecoder)
    return made


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_quick_decoder_and_transformers_write_the_same(generator, by_transformers, records, temperature):
    rows, names = records * 2, ["one", "two", "base", "one"]
    options = {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
    quick, slow = ([*g.stream(rows, names, **options)] for g in (generator, by_transformers))
    assert quick == slow
    assert [o.tokens for o in quick] == [o.tokens for o in slow] and quick[-1].tokens == [24] * 4
    options["batch_size"] = 3
    assert by_transformers.generate(rows, names, **options) == slow[-1]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_both_decoders_keep_a_looping_model_from_looping(generator, by_transformers, records, monkeypatch, lang):
    writer, pick = OutlineWriter(generator.tokenizer, 1, lang, length=2), Pick.__call__
    ids = {}

    def steer(self, logits, rows):
        if self not in ids:
            ids[self] = [[] for _ in records]
        for logit, row in zip(logits, rows, strict=True):
            logit[:] = writer.logits(ids[self][row], len(logit))
        tokens = pick(self, logits, rows)
        for row, token in zip(rows, tokens, strict=True):
            ids[self][row].append(token)
        return tokens

    monkeypatch.setattr(Pick, "__call__", steer)
    free, guarded, slow = (
        [*g.stream(records, "one", max_new_tokens=400, guard=guard)]
        for g, guard in ((generator, "none"), (generator, "structure"), (by_transformers, "structure"))
    )
    assert guarded == slow and guarded[-1] != free[-1]
    assert all(map(is_valid, (*free[-1], *guarded[-1])))
    for before, after in itertools.pairwise(guarded):  # nothing that was shown is taken back
        assert all(a.startswith(b.rstrip()) for b, a in zip(before, after, strict=True))


def test_hidden_states_and_head_give_the_logits(generator, by_transformers, adapters):
    from peft import PeftModel

    sequences = [list(b"Salt and bread"), list(b"Rain")]
    model = PeftModel.from_pretrained(load_model("tiny", "float32", "cpu"), str(adapters["two"]))
    for name in ("two", "base"):
        for made in (generator, by_transformers):
            for ids, states in zip(sequences, made.hidden_states(sequences, name), strict=True):
                with contextlib.nullcontext() if name == "two" else model.disable_adapter():
                    expected = model(input_ids=torch.tensor([ids])).logits[0]
                torch.testing.assert_close(states @ made.lm_head_weight.T, expected, atol=1e-3, rtol=0)


def test_finished_rows_are_told(generator, by_transformers, records, monkeypatch):
    end, vocabulary = generator.tokenizer.eos_token_id, range(len(generator.lm_head_weight))
    first = ord("A")

    def mask(self, logits):  # the first row ends after three tokens
        ends = len(self._line) == 3 and self._line[0] == first
        logits[[v for v in vocabulary if (v == end) != ends]] = -torch.inf  # that token alone, or any other

    monkeypatch.setattr(GuardedOutline, "mask", mask)
    pick = Pick.__call__

    def steer(self, logits, rows):
        for logit, row in zip(logits, rows, strict=True):
            if not self._outlines[row]._line:
                logit[first if row == 0 else first + 1] = 1e6
        return pick(self, logits, rows)

    monkeypatch.setattr(Pick, "__call__", steer)
    for made in (generator, by_transformers):
        *_, last = made.stream(records, "base", max_new_tokens=6)
        assert last.finished == [True, False] and last.tokens == [3, 6]


def test_sampling_follows_the_seed(generator, records):
    options = {"max_new_tokens": 16, "temperature": 1.5}
    first = generator.generate(records, "one", seed=1, **options)
    assert generator.generate(records, "one", seed=1, **options) == first
    assert generator.generate(records, "one", seed=2, **options) != first


def test_closing_a_stream_frees_the_model(generator, records):
    stream = generator.stream(records, "one", max_new_tokens=2000)
    next(stream)
    stream.close()
    assert not generator._lock.locked()
    assert generator.generate(records, "one", max_new_tokens=2)


def test_should_stop_ends_with_what_is_there(generator, records):
    steps, stop = [], threading.Event()
    for texts in generator.stream(records, "one", max_new_tokens=100_000, should_stop=stop.is_set):
        steps.append(texts)
        if len(steps) == 5:
            stop.set()
    assert len(steps) < 1000 and steps[-1].tokens[0] >= 5
    assert steps[-1][0].startswith(steps[4][0].strip())


def test_should_stop_is_asked_while_prompts_are_read(generator, records):
    calls = itertools.count(1)
    steps = list(generator.stream(records, "one", max_new_tokens=8, should_stop=lambda: next(calls) == 2))
    assert steps == [["", ""]]  # the tiny model has two layers: stopped before the second


def test_it_stops_at_the_end_of_turn_token(generator, records, monkeypatch):
    end = generator.tokenizer.eos_token_id

    def mask(self, logits):
        wanted = end if len(self._line) == 3 else 70
        logits[[v for v in range(len(logits)) if v != wanted]] = -torch.inf

    monkeypatch.setattr(GuardedOutline, "mask", mask)
    assert generator.generate([records[0]], "base", max_new_tokens=50) == [generator.tokenizer.decode([70] * 3)]


def test_an_overlong_article_is_cut_with_a_warning(generator, caplog, monkeypatch):
    monkeypatch.setattr("tkpo.generation.MAX_PROMPT_TOKENS", 400)
    record = make_record(AXIS, "literary", "Salt", "word " * 400, "en")
    ids = generator.prompt_ids(record)
    assert 300 < len(ids) <= 400
    assert "were cut" in caplog.text
    text = generator.tokenizer.decode(ids)
    assert "Requirement: literary." in text and text.endswith("<|im_start|>assistant\n")


def test_errors_name_what_there_is(generator, records, tmp_path, adapters):
    with pytest.raises(TKPOError, match="no adapter three; there are: one, two, base"):
        generator.generate(records, "three")
    with pytest.raises(TKPOError, match="2 records but 1 adapter names"):
        generator.generate(records, ["one"])
    with pytest.raises(TKPOError, match="no adapter in"):
        OutlineGenerator("tiny", {"x": tmp_path}, "float32", "cpu")
    with pytest.raises(TKPOError, match="cannot be called 'base'"):
        OutlineGenerator("tiny", {"base": adapters["one"]}, "float32", "cpu")
    assert generator.generate([], "one") == []
