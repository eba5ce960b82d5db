"""Scores against hand-made formulas, the style classifier against the real corpus."""

import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jieba
import numpy as np
import pytest
from scipy import stats

from tkpo.errors import TKPOError
from tkpo.metrics import SCORES, StyleClassifier, evaluate_predictions, paired_bootstrap, rouge_bleu

CORPUS = Path(__file__).parents[1] / "data" / "corpus"
ZERO = {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0, "bleu-4": 0.0}


def ngrams(words, n):
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def f1(overlap, predicted, reference):
    return 100 * 2 * overlap / (predicted + reference)  # = 2PR/(P+R)


def lcs(x, y):
    if not x or not y:
        return 0
    if x[-1] == y[-1]:
        return lcs(x[:-1], y[:-1]) + 1
    return max(lcs(x[:-1], y), lcs(x, y[:-1]))


def bleu4(prediction, reference):
    """Papineni et al. (2002), with NIST geometric smoothing: the k-th zero count becomes 1 / 2^k."""
    logs, k = 0.0, 0
    for n in range(1, 5):
        wanted, found = Counter(ngrams(reference, n)), Counter(ngrams(prediction, n))
        matches = sum((wanted & found).values())
        if matches == 0:
            k += 1
            matches = 0.5**k
        logs += math.log(matches / max(1, sum(found.values()))) / 4
    brevity = min(1.0, math.exp(1 - len(reference) / len(prediction)))
    return 100 * brevity * math.exp(logs)


# Words of up to three letters are never stemmed by rouge-score; "the" and "map" repeat on purpose.
ENGLISH = [
    ("1. the old map\n2. the map of a sea", "1. an old map\n2. the sea and the map"),
    ("1. a cat\n2. a dog", "1. the dog\n2. the cat\n3. the end"),
    ("1. ice", "1. ice on the sea"),
]
CHINESE = [
    ("1. 平遥古城的城墙\n2. 票号的兴起", "1. 城墙与古城\n2. 票号兴起和衰落\n3. 古城的保护"),
    ("1. 运河。运河的水", "1. 水与运河"),
    ("1. 春天的风", "1. 春天的风"),
]


@pytest.mark.parametrize(("prediction", "reference"), ENGLISH)
def test_english_rouge_by_hand(prediction, reference):
    ours = rouge_bleu(prediction, reference, "en")
    p, r = prediction.replace(".", " ").split(), reference.replace(".", " ").split()
    for n in (1, 2):
        overlap = sum((Counter(ngrams(p, n)) & Counter(ngrams(r, n))).values())
        expected = f1(overlap, len(p) - n + 1, len(r) - n + 1)
        assert ours[f"rouge-{n}"] == pytest.approx(expected, abs=1e-3)
    assert ours["rouge-l"] == pytest.approx(f1(lcs(tuple(p), tuple(r)), len(p), len(r)), abs=1e-3)


@pytest.mark.parametrize(("prediction", "reference"), CHINESE)
def test_chinese_rouge_by_hand_over_jieba_words(prediction, reference):
    ours = rouge_bleu(prediction, reference, "zh")
    p, r = (" ".join(jieba.cut(text)).split() for text in (prediction, reference))
    for n in (1, 2):
        p_set, r_set = set(ngrams(p, n)), set(ngrams(r, n))  # rouge-chinese counts each n-gram once
        assert ours[f"rouge-{n}"] == pytest.approx(f1(len(p_set & r_set), len(p_set), len(r_set)), abs=1e-3)
    assert ours["rouge-l"] == pytest.approx(f1(lcs(tuple(p), tuple(r)), len(p), len(r)), abs=1e-3)


def test_english_worked_example():
    # words: prediction "1 ice on sea" (4), reference "1 ice on the sea" (5); 4 shared words, 2 shared
    # bigrams of 3 and 4, longest common subsequence 4.
    ours = rouge_bleu("1. ice on sea", "1. ice on the sea", "en")
    assert ours["rouge-1"] == pytest.approx(100 * 8 / 9, abs=1e-3)
    assert ours["rouge-2"] == pytest.approx(100 * 4 / 7, abs=1e-3)
    assert ours["rouge-l"] == pytest.approx(100 * 8 / 9, abs=1e-3)
    # BLEU: precisions 4/4, 2/3, 1/2, (1/2)/1; brevity exp(1 - 5/4)
    assert ours["bleu-4"] == pytest.approx(100 * math.exp(-0.25) * (1 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25, abs=1e-3)


def test_english_stemmer_is_on():
    assert rouge_bleu("1. running rivers", "1. runs river", "en")["rouge-1"] == 100
    assert rouge_bleu("1. running rivers", "1. runs river", "en")["bleu-4"] < 50


@pytest.mark.parametrize(("prediction", "reference"), ENGLISH)
def test_english_bleu_by_formula_over_words(prediction, reference):
    ours = rouge_bleu(prediction, reference, "en")["bleu-4"]
    assert ours == pytest.approx(bleu4(prediction.split(), reference.split()), abs=1e-3)


@pytest.mark.parametrize(("prediction", "reference"), CHINESE)
def test_chinese_bleu_by_formula_over_characters(prediction, reference):
    ours = rouge_bleu(prediction, reference, "zh")["bleu-4"]
    assert ours == pytest.approx(bleu4(list(prediction), list(reference)), abs=1e-3)


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize(("prediction", "reference"), [("", "1. A"), (" \n", "1. 春天"), ("1. A", ""), ("", "")])
def test_blank_texts_score_zero(prediction, reference, lang):
    assert rouge_bleu(prediction, reference, lang) == ZERO


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("prediction", [".", "…", "。", "?!\n?", "\u3000。", "a", "春", "\x00", "😀😀"])
def test_odd_predictions_give_finite_scores(prediction, lang):
    scores = rouge_bleu(prediction, "1. The sea 春天", lang)
    assert all(type(s) is float and 0 <= s <= 100 for s in scores.values())


def test_unknown_language_is_refused():
    with pytest.raises(TKPOError, match="'fr'"):
        rouge_bleu("1. A", "1. A", "fr")
    with pytest.raises(TKPOError, match="'fr'"):
        StyleClassifier("fr")


def test_jieba_stays_silent():
    code = "from tkpo.metrics import rouge_bleu; rouge_bleu('春天', '春天的风', 'zh')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- style classifier -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus():
    """lang → (rows to fit on, 80 %; the rest): split by article, so that no article is on both sides."""
    split = {}
    for lang in ("en", "zh"):
        rows = [json.loads(x) for f in sorted(CORPUS.glob(f"{lang}-*.jsonl")) for x in f.open(encoding="utf-8")]
        random.Random(1).shuffle(rows)
        cut = len(rows) * 4 // 5
        split[lang] = rows[:cut], rows[cut:]
    return split


def pairs(rows, attributes):
    found = [(row["outlines"][attribute], attribute) for row in rows for attribute in attributes]
    return [outline for outline, _ in found], [attribute for _, attribute in found]


STYLE, DETAIL = ("literary", "objective"), ("concise", "comprehensive", "objective")


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("attributes", [STYLE, DETAIL])
def test_classifier_tells_held_out_outlines_apart(corpus, lang, attributes):
    train, rest = corpus[lang]
    classifier = StyleClassifier(lang).fit(*pairs(train, attributes))
    accuracy = classifier.accuracy(*pairs(rest, attributes))
    print(f"{lang} {'/'.join(attributes)}: {accuracy:.4f} of {len(rest) * len(attributes)}")
    assert accuracy >= 0.93
    # Wrong labels must not score: the accuracy is of the attribute asked for.
    outlines, labels = pairs(rest, attributes)
    assert classifier.accuracy(outlines, labels[1:] + labels[:1]) < 0.1


def test_classifier_is_deterministic_and_gives_probabilities(corpus):
    train, rest = corpus["zh"]
    one, two = (StyleClassifier("zh").fit(*pairs(train, DETAIL)) for _ in range(2))
    for row in rest[:5]:
        verdict = one.predict_proba(row["outlines"]["concise"])
        assert verdict == two.predict_proba(row["outlines"]["concise"])
        assert set(verdict) == set(DETAIL) and sum(verdict.values()) == pytest.approx(1)
        assert [max(verdict, key=verdict.get)] == one.predict([row["outlines"]["concise"]])
    assert one.predict([]) == []


def test_layout_counts_where_the_words_are_the_same():
    orders = [("red", "blue", "green"), ("blue", "green", "red"), ("green", "red", "blue")]
    flat = ["1. {}\n1.1 {}\n1.2 {}".format(*order) for order in orders]
    nested = [text.replace("\n", "\n   ") for text in flat]  # only the indents differ
    classifier = StyleClassifier("en").fit(flat + nested, ["flat"] * 3 + ["nested"] * 3)
    unseen = "1. red\n1.1 green\n1.2 blue"
    assert classifier.predict([unseen, unseen.replace("\n", "\n   ")]) == ["flat", "nested"]


def test_classifier_refuses_what_it_cannot_learn_from():
    with pytest.raises(TKPOError, match="no training outlines in language 'zh'"):
        StyleClassifier("zh").fit([], [])
    with pytest.raises(TKPOError, match="all have the attribute 'concise'"):
        StyleClassifier("en").fit(["1. A", "1. B"], ["concise", "concise"])
    with pytest.raises(TKPOError, match="2 training outlines but 1 attributes"):
        StyleClassifier("en").fit(["1. A", "1. B"], ["concise"])
    with pytest.raises(TKPOError, match="not been fitted"):
        StyleClassifier("en").predict(["1. A"])


# --- evaluation of a split --------------------------------------------------------------------------------


def records(rows, attributes, axis):
    return [
        {
            "id": f"{row['id']}-{attribute}",
            "lang": row["lang"],
            "axis": axis,
            "attribute": attribute,
            "form": "article" if i % 2 else "topic",
            "output": row["outlines"][attribute],
        }
        for i, row in enumerate(rows)
        for attribute in attributes
    ]


@pytest.fixture(scope="module")
def split(corpus):
    train = records(corpus["en"][0][:120], STYLE, "style") + records(corpus["zh"][0], STYLE, "style")
    test = records(corpus["en"][1][:10], STYLE, "style") + records(corpus["zh"][1][:6], STYLE, "style")
    return test, train


def test_references_as_predictions_score_full_marks(split):
    test, train = split
    result = evaluate_predictions(test, [r["output"] for r in test], train)
    assert list(result) == ["en", "zh", "samples"]
    for lang, n in (("en", 20), ("zh", 12)):
        scores = result[lang]
        for name in (*ZERO, "structure_valid", "obeys_detail"):
            assert scores[name] == pytest.approx(100, abs=1e-3), name
        assert scores["control_accuracy"] == scores["classifier_reference_accuracy"] >= 90
        assert scores["n"] == n and {v["n"] for v in scores["by_attribute"].values()} == {n // 2}
        assert set(scores["by_attribute"]) == set(STYLE) and set(scores["by_form"]) == {"article", "topic"}
    assert [s["id"] for s in result["samples"]] == [r["id"] for r in test]
    assert json.loads(json.dumps(result)) == result  # plain Python values only


def test_scores_are_means_of_the_samples(split):
    test, train = split
    mixed = [r["output"] if i % 3 else "" for i, r in enumerate(test)]
    mixed[1] = "1. One\n3. Three"
    result = evaluate_predictions(test, mixed, train)
    for lang in ("en", "zh"):
        own = [s for s in result["samples"] if s["lang"] == lang]
        for name in SCORES:
            assert result[lang][name] == pytest.approx(np.mean([s[name] for s in own]), abs=1e-4)
            topic = [s[name] for s in own if s["form"] == "topic"]
            assert result[lang]["by_form"]["topic"][name] == pytest.approx(np.mean(topic), abs=1e-4)
    for i in range(0, len(test), 3):  # blank predictions score nothing at all, control accuracy included
        assert {result["samples"][i][name] for name in SCORES[:-1]} == {0.0}
    assert result["samples"][1]["structure_valid"] == 0
    assert result["en"]["structure_valid"] == pytest.approx(100 * 12 / 20)  # 7 of 20 blank, 1 malformed


def test_the_other_attributes_outline_fails_control_but_not_structure(split):
    test, train = split
    swapped = [test[i ^ 1]["output"] for i in range(len(test))]  # literary and objective alternate
    result = evaluate_predictions(test, swapped, train)
    for lang in ("en", "zh"):
        assert result[lang]["control_accuracy"] <= 10 <= 90 <= result[lang]["classifier_reference_accuracy"]
        assert result[lang]["structure_valid"] == 100


def test_valid_outline_may_break_the_level_of_detail(corpus):
    train, rest = corpus["zh"]
    test = records(rest[:4], ("concise",), "detail")
    result = evaluate_predictions(
        test, [row["outlines"]["comprehensive"] for row in rest[:4]], records(train, DETAIL, "detail")
    )
    assert result["zh"]["structure_valid"] == 100 and result["zh"]["obeys_detail"] == 0
    assert "en" not in result


def test_each_axis_has_a_classifier_of_its_own(corpus):
    """On a second axis that calls literary what the first calls objective, the first must not be confused."""
    train, rest = corpus["zh"]
    other = {"literary": "objective", "objective": "literary"}

    def mirrored(rows):
        return [{**r, "axis": "mirror", "attribute": other[r["attribute"]]} for r in records(rows, STYLE, "style")]

    test = records(rest[:5], STYLE, "style") + mirrored(rest[:5])
    both = records(train, STYLE, "style") + mirrored(train)
    result = evaluate_predictions(test, [r["output"] for r in test], both)
    assert result["zh"]["control_accuracy"] == 100
    with pytest.raises(TKPOError, match="language 'zh' on axis 'mirror'"):
        evaluate_predictions(test, [""] * len(test), records(train, STYLE, "style"))


def test_evaluation_refuses_bad_input_by_name(split):
    test, train = split
    with pytest.raises(TKPOError, match="32 records but 31 predictions"):
        evaluate_predictions(test, [""] * 31, train)
    with pytest.raises(TKPOError, match="no records"):
        evaluate_predictions([], [], train)
    with pytest.raises(TKPOError, match="language 'zh'"):
        evaluate_predictions(test, [""] * 32, [r for r in train if r["lang"] == "en"])
    broken = [*test[:4], {k: v for k, v in test[4].items() if k != "form"}]
    with pytest.raises(TKPOError, match=rf"record 5 \(id {test[4]['id']}\) has no field 'form'"):
        evaluate_predictions(broken, [""] * 5, train)
    with pytest.raises(TKPOError, match=r"record 1 .* asks for 'casual'.*literary, objective"):
        evaluate_predictions([{**test[0], "attribute": "casual"}], ["1. A"], train)


# --- paired bootstrap -------------------------------------------------------------------------------------


def test_identical_systems_gain_nothing():
    scores = np.random.default_rng(0).uniform(0, 100, 50)
    result = paired_bootstrap(scores, scores)
    assert result["gain"] == result["low"] == result["high"] == 0
    assert result["share_a_better"] == 0 and result["undefined_draws"] == 0


def test_two_systems_of_one_quality_have_zero_inside_the_interval():
    noise = np.random.default_rng(3).normal(0, 5, (2, 200))
    result = paired_bootstrap(50 + noise[0], 50 + noise[1])
    assert result["low"] < 0 < result["high"]


def test_clear_shift_is_above_zero_and_pairing_makes_it_narrow():
    rng = np.random.default_rng(1)
    b = rng.uniform(10, 90, 100)
    a = b + rng.uniform(4, 6, 100)
    result = paired_bootstrap(a, b)
    assert result["gain"] == pytest.approx(100 * (a.mean() - b.mean()) / b.mean())
    assert 0 < result["low"] < result["gain"] < result["high"] and result["share_a_better"] == 1
    shuffled = paired_bootstrap(rng.permutation(a), b)  # no longer paired: the same gain, a wider interval
    assert shuffled["gain"] == pytest.approx(result["gain"])
    assert shuffled["high"] - shuffled["low"] > 3 * (result["high"] - result["low"])


def test_interval_agrees_with_scipys_paired_percentile_bootstrap():
    a, b = np.random.default_rng(6).gamma(4, 10, (2, 60))
    ours = paired_bootstrap(a, b)
    theirs = stats.bootstrap(
        (a, b),
        lambda x, y, axis: 100 * (x.mean(axis=axis) / y.mean(axis=axis) - 1),
        paired=True,
        vectorized=True,
        n_resamples=9999,
        method="percentile",
        rng=7,
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours["low"] == pytest.approx(theirs.low, abs=0.04 * width)
    assert ours["high"] == pytest.approx(theirs.high, abs=0.04 * width)


def test_same_seed_same_result():
    a, b = np.random.default_rng(2).uniform(0, 100, (2, 30))
    assert paired_bootstrap(a, b, seed=4) == paired_bootstrap(list(a), list(b), seed=4)
    assert paired_bootstrap(a, b, seed=4) != paired_bootstrap(a, b, seed=5)
    assert json.dumps(paired_bootstrap(a, b, draws=1500))


def test_two_samples_by_hand():
    # Resamples of two samples: (0,0) 1/4, (0,1) and (1,0) 1/2, (1,1) 1/4.
    # Their relative gains: 2/1 → +100 %, 3/3 → 0 % and 1/2 → -50 %. A 40 % interval has quantiles 0.3, 0.7.
    result = paired_bootstrap([2, 1], [1, 2], draws=20_000, level=0.4)
    assert (result["gain"], result["low"], result["high"]) == (0, 0, 0)
    assert result["share_a_better"] == pytest.approx(0.25, abs=0.02)
    wide = paired_bootstrap([2, 1], [1, 2], draws=20_000, level=0.95)
    assert (wide["low"], wide["high"]) == (pytest.approx(-50), pytest.approx(100))
    assert paired_bootstrap([3], [2])["low"] == pytest.approx(50)  # one sample: every draw is the same


def test_zero_denominators_are_named():
    nothing = paired_bootstrap([1, 2], [0, 0], draws=100)
    assert nothing["gain"] is nothing["low"] is nothing["high"] is None
    assert (nothing["undefined_draws"], nothing["share_a_better"]) == (100, 1)
    some = paired_bootstrap([1, 2], [0, 2], draws=20_000)  # (0,0) is a quarter of the draws
    assert some["undefined_draws"] / 20_000 == pytest.approx(0.25, abs=0.02)
    assert (some["gain"], some["low"], some["high"]) == (pytest.approx(50), 0, pytest.approx(50))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 2], [1], "2 scores of a but 1"),
        ([], [], "at least one"),
        ([1, math.nan], [1, 1], "finite"),
        ([-1], [1], "0 or"),
    ],
)
def test_bootstrap_refuses_senseless_scores(a, b, message):
    with pytest.raises(TKPOError, match=message):
        paired_bootstrap(a, b)


@pytest.mark.parametrize("options", [{"draws": 0}, {"level": 0}, {"level": 95}])
def test_bootstrap_refuses_senseless_options(options):
    with pytest.raises(TKPOError, match="draws ≥ 1"):
        paired_bootstrap([1], [1], **options)
