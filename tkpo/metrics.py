"""Scores of generated outlines: ROUGE and BLEU, control accuracy, structure, and gains with intervals."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge
from rouge_score.rouge_scorer import RougeScorer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from tkpo.chinese import cut
from tkpo.errors import TKPOError
from tkpo.outline import check_lang

ROUGES = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}  # our names → rouge-score's
TEXT_SCORES = (*ROUGES, "bleu-4")
SCORES = (
    *TEXT_SCORES,
    "control_accuracy",
    "structure_valid",
    "obeys_detail",
    "classifier_reference_accuracy",
)


@cache
def _english_rouge() -> RougeScorer:
    return RougeScorer(list(ROUGES.values()), use_stemmer=True)


def rouge_bleu(prediction: str, reference: str, lang: str) -> dict[str, float]:
    """Score one outline against its reference: rouge-1, rouge-2, rouge-l (F1) and bleu-4, each × 100.

    Chinese ("zh"): LLaMA-Factory's prediction protocol (its `train/sft/metric.py`). Words by jieba, ROUGE by
    rouge-chinese (whose n-grams are sets, so a repeated one counts once), sentence BLEU-4 over characters.
    English ("en"): ROUGE by rouge-score with its Porter stemmer, sentence BLEU-4 over words (`str.split`).
    Both: nltk's smoothing method 3, scores rounded to 4 decimals as LLaMA-Factory does. The numbering is part
    of the text. Where either text is blank, every score is 0.

    Raises:
        TKPOError: for a language other than "en" and "zh".
    """
    check_lang(lang)
    if not prediction.strip() or not reference.strip():
        return dict.fromkeys(TEXT_SCORES, 0.0)
    if lang == "zh":
        rouge = Rouge().get_scores(" ".join(cut(prediction)), " ".join(cut(reference)))[0]
        scores = {name: rouge[name]["f"] for name in ROUGES}
        words, reference_words = list(prediction), list(reference)
    else:
        rouge = _english_rouge().score(reference, prediction)
        scores = {name: rouge[theirs].fmeasure for name, theirs in ROUGES.items()}
        words, reference_words = prediction.split(), reference.split()
    smoothing = SmoothingFunction().method3
    scores["bleu-4"] = sentence_bleu([reference_words], words, smoothing_function=smoothing)
    return {name: round(float(score) * 100, 4) for name, score in scores.items()}


def _layout(outlines: Sequence[str]) -> np.ndarray:
    """(n, 6) layout features: headings, sub-headings, mean and greatest line length, commas, questions."""
    rows = []
    for outline in outlines:
        lines = outline.strip().split("\n")
        lengths = [len(line.strip()) for line in lines]
        subs = sum(line.startswith((" ", "\t")) for line in lines)
        commas, questions = (sum(map(outline.count, marks)) / len(lines) for marks in (",，", "?？"))
        rows.append([len(lines) - subs, subs, float(np.mean(lengths)), max(lengths), commas, questions])
    return np.array(rows, dtype=float)


class StyleClassifier:
    """Tells the attributes of one axis apart by an outline's text and layout, in one language.

    TF-IDF (English: word 1-2-grams and character 2-4-grams; Chinese: character 1-3-grams) and scaled layout
    features under a logistic regression. Deterministic. Fit it on the training split's references only.
    """

    def __init__(self, lang: str):
        check_lang(lang)
        if lang == "en":
            words = TfidfVectorizer(token_pattern=r"[^\W\d_]+", ngram_range=(1, 2), sublinear_tf=True)
            characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
            text = make_union(words, characters)
        else:
            text = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
        layout = make_pipeline(FunctionTransformer(_layout), StandardScaler())
        regression = LogisticRegression(C=10.0, max_iter=1000, random_state=0)
        self.lang = lang
        self.model = make_pipeline(make_union(text, layout), regression)

    def fit(self, outlines: Sequence[str], attributes: Sequence[str]) -> "StyleClassifier":
        """Learn from outlines and their attributes; returns self.

        Raises:
            TKPOError: nothing to learn from, fewer than two attributes, or lengths that differ.
        """
        check_lengths("training outlines", outlines, "attributes", attributes)
        if len(outlines) == 0:
            raise TKPOError(f"no training outlines in language {self.lang!r}: give training records in it")
        if len(set(attributes)) < 2:
            raise TKPOError(
                f"the training outlines in language {self.lang!r} all have the attribute {attributes[0]!r}: "
                "a style classifier needs at least two attributes"
            )
        self.model.fit(list(outlines), list(attributes))
        return self

    @property
    def attributes(self) -> list[str]:
        """The attributes it can assign, sorted."""
        if not hasattr(self.model[-1], "classes_"):
            raise TKPOError(f"the style classifier for language {self.lang!r} has not been fitted: call fit")
        return [str(attribute) for attribute in self.model[-1].classes_]

    def predict(self, outlines: Sequence[str]) -> list[str]:
        """The likeliest attribute of each outline."""
        if not self.attributes or len(outlines) == 0:
            return []
        return [str(attribute) for attribute in self.model.predict(list(outlines))]

    def predict_proba(self, outline: str) -> dict[str, float]:
        """Attribute → probability (they sum to 1) for one outline."""
        return dict(zip(self.attributes, self.model.predict_proba([outline])[0].tolist(), strict=True))

    def log_odds(self, outlines: Sequence[str], attributes: Sequence[str]) -> list[float]:
        """log p / (1 − p), natural, of each outline's own attribute; above 0: likelier than the others together."""
        check_lengths("outlines", outlines, "attributes", attributes)
        if not self.attributes or len(outlines) == 0:
            return []
        logs = self.model.predict_log_proba(list(outlines))
        rows = []
        for log, attribute in zip(logs, attributes, strict=True):
            own = self.attributes.index(attribute)
            rows.append(float(log[own] - np.logaddexp.reduce(np.delete(log, own))))
        return rows

    def accuracy(self, outlines: Sequence[str], attributes: Sequence[str]) -> float:
        """Share (0 to 1) of the outlines to which it assigns their attribute."""
        check_lengths("outlines", outlines, "attributes", attributes)
        if len(outlines) == 0:
            raise TKPOError("no outlines to measure the style classifier's accuracy on")
        return float(np.mean([p == a for p, a in zip(self.predict(outlines), attributes, strict=True)]))


def evaluate_predictions(records: Sequence[dict], predictions: Sequence[str], train_records: Sequence[dict]) -> dict:
    """Score predictions on a split by the published protocol, English and Chinese apart, everything in per cent.

    Args:
        records, predictions, train_records: as `tkpo.scores.score_outlines` takes them.

    Returns:
        `{"en": {...}, "zh": {...}, "samples": [...]}`, with only the languages that occur. A language holds
        the mean of each of `SCORES`, `n`, and the same again under `by_attribute` and `by_form`:
        `control_accuracy` is the share of outputs that the classifier assigns to the asked attribute (a blank
        output never is), `classifier_reference_accuracy` the same for the references, `structure_valid` the
        share that parses, `obeys_detail` the share that parses and keeps the attribute's level of detail.
        `samples` has each record's own scores, in order, beside the row of `score_outlines`.

    Raises:
        TKPOError: as `score_outlines`; no records; no training records.
    """
    from tkpo.scores import score_outlines  # which scores by this module

    check_lengths("records", records, "predictions", predictions)
    if not records:
        raise TKPOError("no records to evaluate")
    samples = score_outlines(records, predictions, train_records)
    for row, prediction in zip(samples, predictions, strict=True):
        row |= {theirs: row[f"{ours}_numbered"] for theirs, ours in ROUGES.items()}
        row |= {
            "bleu-4": row["bleu4_numbered"],
            "control_accuracy": 100.0 * (row["read_as"] == row["attribute"] and bool(prediction.strip())),
            "structure_valid": row["valid"],
            "obeys_detail": row["level"],
            "classifier_reference_accuracy": row["reference_control"],
        }
    result: dict = {}
    for lang in sorted({r["lang"] for r in records}):
        own = [s for s in samples if s["lang"] == lang]
        result[lang] = _means(own)
        for name in ("attribute", "form"):
            values = sorted({s[name] for s in own})
            result[lang][f"by_{name}"] = {v: _means([s for s in own if s[name] == v]) for v in values}
    return result | {"samples": samples}


def _means(samples: list[dict]) -> dict:
    means = {name: round(float(np.mean([s[name] for s in samples])), 4) for name in SCORES}
    return means | {"n": len(samples)}


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> dict:
    """Relative gain of system a over system b, with a percentile interval by paired bootstrap.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; for paired systems,
    Koehn, "Statistical significance tests for machine translation evaluation" (EMNLP 2004).

    Args:
        a, b: scores (≥ 0) of the two systems on the same samples, in the same order.
        draws: how many resamples of the samples.
        seed: of the resampling; the same seed gives the same result.
        level: of the interval, between 0 and 1.

    Returns:
        `gain`: 100 · (mean a − mean b) / mean b; `low`, `high`: the interval's ends, in per cent;
        `share_a_better`: the share (0 to 1) of draws in which a's mean is above b's; `n`; `draws`; `level`;
        `undefined_draws`: draws in which b's mean is 0. They have no relative gain, so `low` and `high` leave
        them out. Where b's mean over all samples is 0, `gain`, `low` and `high` are None.

    Raises:
        TKPOError: lengths that differ, no samples, scores below 0 or not finite, or senseless draws or level.
    """
    check_lengths("scores of a", a, "scores of b", b)
    scores = np.array([a, b], dtype=float)
    n = scores.shape[1]
    if n == 0 or not np.isfinite(scores).all() or (scores < 0).any():
        raise TKPOError("paired_bootstrap needs at least one sample, and finite scores of 0 or more")
    if draws < 1 or not 0 < level < 1:
        raise TKPOError(f"paired_bootstrap got draws={draws} and level={level}: give draws ≥ 1, 0 < level < 1")
    rng = np.random.default_rng(seed)
    means = np.empty((2, draws))
    for start in range(0, draws, 1000):  # in blocks, so that memory stays small
        block = slice(start, min(start + 1000, draws))
        means[:, block] = scores[:, rng.integers(n, size=(block.stop - start, n))].mean(axis=2)
    defined = means[1] > 0
    gain = low = high = None
    if scores[1].any():
        gain = float(100 * (scores[0].mean() / scores[1].mean() - 1))
        if defined.any():
            gains = 100 * (means[0, defined] / means[1, defined] - 1)
            low, high = np.quantile(gains, [(1 - level) / 2, (1 + level) / 2]).tolist()
    interval = {"gain": gain, "low": low, "high": high}
    counts = {"n": n, "draws": draws, "level": level, "undefined_draws": int((~defined).sum())}
    return interval | {"share_a_better": float((means[0] > means[1]).mean())} | counts


def check_lengths(name: str, items: Sequence, other: str, others: Sequence) -> None:
    """TKPOError where one of two lists that belong together is longer."""
    if len(items) != len(others):
        raise TKPOError(f"{len(items)} {name} but {len(others)} {other}: give one for each, in the same order")


def check_fields(kind: str, records: Sequence[dict], fields: Sequence[str]) -> None:
    """TKPOError that names the first record without one of the fields or in an unknown language."""
    for number, record in enumerate(records, 1):
        if missing := [field for field in fields if field not in record]:
            where = f"{kind} {number} (id {record.get('id', 'missing')})"
            raise TKPOError(f"{where} has no field {missing[0]!r}: build the data set with the project's script")
        check_lang(record["lang"])
