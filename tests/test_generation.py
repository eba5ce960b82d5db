"""Generation on the tiny preset with adapters made here; oracles are transformers' own generate and merged weights."""

import contextlib
import itertools
import json
import shutil
import threading

import pytest
import torch
from outline_writer import OutlineWriter
from random_adapters import random_adapter

from tkpo.attributes import get_axis
from tkpo.data import arrange, make_record, user_message
from tkpo.decoding import PackedDecoder
from tkpo.errors import TKPOError
from tkpo.generation import OutlineGenerator
from tkpo.loop_guard import GuardedOutline
from tkpo.outline import is_valid
from tkpo.presets import base_model_hash, load_model, load_tokenizer, resolve_model
from tkpo.prompting import PromptWriter
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


def test_dora_adapters_are_written_apart_in_one_call(adapters, records, tmp_path):
    """PEFT mixes no DoRA adapter with others in a batch; each row is what its adapter writes alone, merged."""
    mixed = {**adapters, "dora": random_adapter(tmp_path / "dora", 5, use_dora=True)}
    made = OutlineGenerator("tiny", mixed, "float32", "cpu")
    rows, names = [records[0], records[1], records[0], records[1], records[1]], ["dora", "base", "one", "dora", "one"]
    texts = made.generate(rows, names, max_new_tokens=12, guard="none")
    for record, name, text in zip(rows, names, texts, strict=True):
        expected = reference(record, mixed.get(name), tokens=12)
        assert text == load_tokenizer("tiny").decode(expected, skip_special_tokens=True).strip()


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


@pytest.fixture(scope="module")
def article_first(adapters, tmp_path_factory):
    """A generator whose adapter "two" was trained on prompts with the article before the instruction."""
    folder = tmp_path_factory.mktemp("ordered") / "two"
    shutil.copytree(adapters["two"], folder)
    record = {"base_model": "tiny", "base_model_sha256": base_model_hash(resolve_model("tiny"))}
    (folder / "tkpo.json").write_text(json.dumps({**record, "prompt_order": "article_first"}))
    return OutlineGenerator("tiny", {"one": adapters["one"], "two": folder}, "float32", "cpu")


def test_an_adapters_prompts_stand_in_its_own_order(generator, article_first, adapters):
    record = make_record(AXIS, "literary", "Salt", "Salt came from the sea, in literary terms.", "en")
    after = arrange(record, AXIS, "article_first")
    assert article_first.prompt_orders == {
        "one": "instruction_first",
        "two": "article_first",
        "base": "instruction_first",
    }
    texts = article_first.generate([record] * 3, ["one", "two", "base"], max_new_tokens=16, guard="none")
    rows = [(record, adapters["one"]), (after, adapters["two"]), (record, None)]
    decode = lambda ids: generator.tokenizer.decode(ids, skip_special_tokens=True).strip()  # noqa: E731
    assert texts == [decode(reference(r, adapter, 16)) for r, adapter in rows]
    assert generator.generate([record], "two", max_new_tokens=16, guard="none") != texts[1:2]
    prompt = generator.tokenizer.decode(article_first.prompt_ids(record, "two"))
    assert prompt.index("Salt came") < prompt.index("Requirement: literary.")
    base = OutlineGenerator("tiny", {}, "float32", "cpu", base_prompt_order="article_first")
    assert base.prompt_ids(record, "base") == article_first.prompt_ids(record, "two")
    with pytest.raises(TKPOError, match="no prompt order 'last'"):
        OutlineGenerator("tiny", {}, "float32", "cpu", base_prompt_order="last")


def test_all_styles_of_an_article_read_it_once(article_first, monkeypatch):
    axis = get_axis("level_of_detail")
    document = "Salt came from the sea. " * 30
    records = [make_record(axis, style, "Salt", document, "en") for style in axis.attributes]
    alone = [article_first.generate([r], "two", max_new_tokens=8)[0] for r in records]
    read, forward = [], article_first.decoder._forward
    monkeypatch.setattr(
        article_first.decoder, "_forward", lambda ids, *rest: read.append(len(ids)) or forward(ids, *rest)
    )
    assert article_first.generate(records, "two", max_new_tokens=8) == alone
    assert sum(read) < 1.5 * len(article_first.prompt_ids(records[0], "two"))


def test_style_strength_is_two_forwards_combined(generator, by_transformers, article_first, adapters):
    """Oracle: transformers' plain forward under the prompt and under the flipped one, token by token."""
    from peft import PeftModel

    record = make_record(AXIS, "literary", "Salt", "An objective sea, a literary shore.", "en")
    gamma, tokenizer = 1.5, generator.tokenizer

    def expected(name, order):
        model = load_model("tiny", "float32", "cpu")
        if name != "base":
            model = PeftModel.from_pretrained(model, str(adapters[name])).merge_and_unload()
        prompts = []
        for attribute in ("literary", "objective"):
            own = make_record(AXIS, attribute, "Salt", "An objective sea, a literary shore.", "en")
            chat = [{"role": "user", "content": user_message(arrange(own, AXIS, order))}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        written = []
        for _ in range(16):
            with torch.no_grad():
                z, flipped = (model(input_ids=torch.tensor([p + written])).logits[0, -1] for p in prompts)
            written.append(int((z + gamma * (z - flipped)).argmax()))
            if written[-1] == tokenizer.eos_token_id:
                break
        return tokenizer.decode(written, skip_special_tokens=True).strip()

    options = {"max_new_tokens": 16, "guard": "none", "style_strength": gamma}
    for made, orders in ((generator, {}), (by_transformers, {}), (article_first, {"two": "article_first"})):
        names = ["one", "two", "base"]
        texts = made.generate([record] * 3, names, **options)
        assert texts == [expected(name, orders.get(name, "instruction_first")) for name in names]
        assert list(made.each([record] * 3, names, batch_size=1, **options)) == list(enumerate(texts))
    plain = generator.generate([record] * 3, names, max_new_tokens=16, guard="none")
    assert plain != generator.generate([record] * 3, names, **options)


def test_style_strength_zero_reads_no_flipped_prompt(generator, records, monkeypatch):
    monkeypatch.setattr(PromptWriter, "flipped", lambda *args: pytest.fail("flipped"))
    assert generator.generate(records, "one", max_new_tokens=4, style_strength=0.0)


def test_the_flip_of_a_record_in_other_words(generator):
    record = {"instruction": "Outline this. Style: LITERARY", "input": "An objective text"}
    assert generator.prompts.flipped(record)["instruction"] == "Outline this. Style: OBJECTIVE"
    with pytest.raises(TKPOError, match="no attribute phrase"):
        generator.prompts.flipped({"instruction": "Outline this.", "input": "A text"})


def test_min_p_leaves_out_improbable_tokens(generator, records):
    options = {"max_new_tokens": 24, "temperature": 50.0, "seed": 1}
    greedy = generator.generate(records, "one", max_new_tokens=24)
    assert generator.generate(records, "one", min_p=1.0, **options) == greedy  # the likeliest token alone is left
    assert generator.generate(records, "one", min_p=0.01, **options) != greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"min_p": 0.1}, "min_p needs a temperature"),
        ({"min_p": 2.0, "temperature": 1.0}, "min_p must be between 0 and 1"),
        ({"seed": -1}, "seed"),
        ({"guard": "strict"}, "no guard 'strict'; there are: structure, none"),
        ({"style_strength": 11.0}, "style_strength must be between 0 and 10"),
    ],
)
def test_settings_outside_their_range(generator, records, options, message):
    with pytest.raises(TKPOError, match=message):
        generator.generate(records, "one", **options)


LONG = "".join(f"Word{n} " for n in range(120)) + "the end"


@pytest.mark.parametrize(
    "record",
    [
        make_record(AXIS, "literary", "Salt", LONG, "en"),
        arrange(make_record(AXIS, "literary", "Salt", LONG, "en"), AXIS, "article_first"),
        {"instruction": LONG, "input": "Outline the above. Requirement: literary."},
        {"instruction": f"Outline the text. Requirement: literary. Input:\n{LONG}"},
        {"instruction": f"Outline the text. Requirement: literary. Input:\n{LONG}", "input": ""},
        {"instruction": f"{LONG}\nOutline the above. Requirement: literary."},
    ],
)
def test_only_the_tail_of_an_overlong_article_is_cut(generator, caplog, monkeypatch, record):
    whole = generator.prompt(record)
    assert whole.cut == 0 and not caplog.text
    monkeypatch.setattr("tkpo.prompting.MAX_ARTICLE_TOKENS", 200)
    prompt = generator.prompt(record)
    assert prompt.cut > 300 and f"its last {prompt.cut} were cut" in caplog.text
    text, uncut = generator.tokenizer.decode(prompt.ids), generator.tokenizer.decode(whole.ids)
    assert "Requirement: literary." in text and text.endswith("<|im_start|>assistant\n")
    assert "Word1 " in text and "the end" not in text
    kept = next(n for n in range(len(text)) if text[n] != uncut[n])
    rest = text[kept:]
    assert uncut.endswith(rest)  # what is left out stands in one piece
    assert len(whole.ids) - len(prompt.ids) - prompt.cut in (0, 1)  # a space at the cut goes as well
    *_, outlines = generator.stream([record], "base", max_new_tokens=1)
    assert outlines.cut == [prompt.cut]


def test_reading_reports_its_progress(generator, records):
    steps = list(generator.stream(records, "one", max_new_tokens=3, reading=True))
    shares = [step.read for step in steps if step.read < 1]
    assert shares == sorted(shares) and len(shares) >= 2
    assert all(step == ["", ""] and step.tokens == [0, 0] for step in steps[: len(shares)])
    assert [step for step in steps if step.read == 1][-4:] == list(generator.stream(records, "one", max_new_tokens=3))


def test_engines(adapters, by_transformers, records):
    made = OutlineGenerator("tiny", adapters, "float32", "cpu", engine="transformers")
    assert (made.engine, by_transformers.engine) == ("transformers", "transformers")
    assert OutlineGenerator("tiny", {}, "float32", "cpu").engine == "decoder"
    with pytest.raises(TKPOError, match="the engine decoder does not run tiny so"):
        OutlineGenerator("tiny", {}, "bfloat16", "cpu", engine="decoder")
    with pytest.raises(TKPOError, match="no engine 'gguf'"):
        OutlineGenerator("tiny", {}, engine="gguf")


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
