"""How good answers are: text in, numbers out. No torch, no model, no network.

    score_sample(prediction, reference)   the scores of one answer
    summarize(samples, seed=...)          the scores of a log, with 95 % intervals
    compare(a, b, seed=...)               two logs of the same questions, with p-values
    most_changed(a, b, n)                 the answers behind the difference

Samples are the records of the log that `sft.py test` writes, one JSON object a line: `question`,
`reference`, `generated`, the scores of `score_sample`, `generated_tokens`, `ended`, and
`reference_nll` with `reference_tokens`.

All scores but answer length and perplexity lie in [0, 1], and higher is better:

    exact_match   both texts are equal after SQuAD normalisation
    token_f1      harmonic mean of precision and recall over the words of the normalised texts
    rouge1/2/L    ROUGE F-measure of the rouge-score package, with Porter stemming
    bleu          BLEU-4: of a corpus in `summarize`, of one sentence in `score_sample`, where it
                  serves only to look at single answers
    answer_length generated tokens, mean
    ended_by_eos  share of the answers that the model ended by itself
    perplexity    of the reference answers: exp(sum of -log p / number of tokens)
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError

Sample = Mapping[str, Any]
Array = np.ndarray[Any, np.dtype[np.float64]]

ORDERS = (1, 2, 3, 4)  # of the n-grams that BLEU-4 counts
LEVEL = 95.0  # per cent, of every interval


# ----------------------------------------------------------------------------- exact match and F1

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """SQuAD normalisation: lower case, no ASCII punctuation, no articles, single spaces.

    In this order, as in the evaluation script of SQuAD (Rajpurkar et al. 2016): punctuation goes
    without leaving a space ("1,000" -> "1000", "well-known" -> "wellknown"), then each of the words
    "a", "an", "the", then whitespace at both ends and all but one space between words.
    """
    return " ".join(_ARTICLES.sub(" ", _plain(text)).split())


def _plain(text: str) -> str:
    """Lower case without ASCII punctuation, single spaces; articles stay."""
    return " ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split())


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if both texts are the same after `normalize`, else 0.0.

    The answers "A" (of a multiple choice) or "-" have nothing left after normalisation, and must
    not equal every other such text. So if either text becomes empty, both are compared with their
    articles kept ("A." is "a", but not "the"), and if either is empty even so, as they stand but
    for whitespace around them ("-" is not "+" and not ""). Hence two empty texts match, and an
    empty text matches nothing else.
    """
    for form in (normalize, _plain):
        if form(prediction) and form(reference):
            return float(form(prediction) == form(reference))
    return float(prediction.strip() == reference.strip())


def token_f1(prediction: str, reference: str) -> float:
    """F1 over the words of both normalised texts, each word as often as it occurs (SQuAD).

    2 * common / (words of the prediction + words of the reference), which is the harmonic mean of
    precision and recall. If either text has no word after normalisation, F1 is `exact_match`
    (the rule of SQuAD 2.0): 1.0 for two empty texts, 0.0 if only one is empty.
    """
    predicted, expected = normalize(prediction).split(), normalize(reference).split()
    if not predicted or not expected:
        return exact_match(prediction, reference)
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected))


# ------------------------------------------------------------------------------------------- BLEU

# The rules of NIST's mteval-v13a.pl, that BLEU scores in papers are usually computed with, in its
# order. Substitution by substitution, since a character that one match used up is not seen by the
# next one: with look-arounds instead, "a.,5" would be split differently.
_SYMBOLS = "".join(sorted(set(string.punctuation) - set("',-.")))
_RULES = (
    (re.compile(f"([{re.escape(_SYMBOLS)}])"), r" \1 "),  # every ASCII symbol, but for ' , - .
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # . and , unless after a digit
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),  # . and , unless before a digit
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),  # - after a digit
)
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def bleu_words(text: str) -> list[str]:
    """The words that BLEU counts: tokenisation "13a", case kept.

    The same as the tokeniser `13a` of sacrebleu (Post 2018): a hyphen at the end of a line joins
    its two parts, four HTML entities are put back, ASCII symbols are words of their own, and so are
    full stops and commas that do not stand between digits, and hyphens behind a digit.
    """
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text.split()


def _bleu_counts(predictions: Iterable[str], references: Iterable[str]) -> Array:
    """[N, 10]: what BLEU sums over a corpus, for each answer.

    Columns: matching n-grams of order 1 to 4, all n-grams of order 1 to 4 in the prediction, words
    of the prediction, words of the reference.
    """
    from nltk.translate.bleu_score import modified_precision

    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        predicted, expected = bleu_words(prediction), bleu_words(reference)
        matches = [modified_precision([expected], predicted, n).numerator for n in ORDERS]
        # Counted here, since nltk's denominator is at least 1.
        possible = [max(0, len(predicted) - n + 1) for n in ORDERS]
        rows.append([*matches, *possible, len(predicted), len(expected)])
    return np.array(rows, dtype=np.float64)


def _bleu(totals: Array) -> Array:
    """[..., 10] sums of `_bleu_counts` -> [...] BLEU-4 of a corpus (Papineni et al. 2002).

    Geometric mean of the four n-gram precisions, clipped counts summed over the corpus, times the
    brevity penalty. Words: `bleu_words`. Counting: nltk. Smoothing: NIST's, which is `method3` of
    nltk and `exp` of sacrebleu: the k-th order without any match has the numerator 1 / 2^k.

    This is sacrebleu's default, divided by 100. `nltk.translate.bleu_score.corpus_bleu` with
    `method3` gives the same as long as every prediction has four words; for a shorter one it adds
    a 3- or 4-gram to the totals that does not exist, and we do not.

    0.0 if no word matches (empty predictions), and as in sacrebleu if no prediction has four words:
    BLEU-4 says nothing about such answers, use F1 or ROUGE.
    """
    matches, possible = totals[..., 0:4], totals[..., 4:8]
    predicted, expected = totals[..., 8], totals[..., 9]
    missing = matches == 0
    numerators = np.where(missing, 0.5 ** np.cumsum(missing, axis=-1), matches)
    # The maxima only keep rows free of warnings that become 0 below.
    precision = np.mean(np.log(numerators) - np.log(np.maximum(possible, 1)), axis=-1)
    brevity = np.minimum(0.0, 1 - expected / np.maximum(predicted, 1))
    defined = (matches[..., 0] > 0) & (possible[..., 3] > 0)
    return np.where(defined, np.exp(precision + brevity), 0.0)


# ------------------------------------------------------------------------------------- one sample


def score_sample(prediction: str, reference: str) -> dict[str, float]:
    """exact_match, token_f1, rouge1, rouge2, rougeL and bleu of one answer, each in [0, 1].

    ROUGE (Lin 2004) is the F-measure of the package rouge-score with `use_stemmer=True`; rougeL
    takes the whole text as one sentence. Its words are runs of the ASCII letters and digits:
    other scripts score 0, and so does an empty text, against another empty one too.

    bleu is the sentence's BLEU with nltk, words and smoothing as in `_bleu`. A prediction of
    n < 4 words is scored on orders up to n (sacrebleu calls it effective order), so that a short
    perfect answer has 1.0. An empty one has 0.0. It is not a part of the corpus's BLEU.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    rouge = _rouge_scorer().score(reference, prediction)
    bleu = sentence_bleu(
        [bleu_words(reference)],
        bleu_words(prediction),
        smoothing_function=SmoothingFunction().method3,
        auto_reweigh=True,
    )
    return {
        "exact_match": exact_match(prediction, reference),
        "token_f1": token_f1(prediction, reference),
        **{name: float(rouge[name].fmeasure) for name in ("rouge1", "rouge2", "rougeL")},
        "bleu": float(bleu),
    }


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # half a second, for those who need it

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


# ------------------------------------------------------------------------------- a log, two logs

# Every score of a corpus is a function of sums over its samples. So a sample is a row of numbers,
# a resampled corpus is a row of sums, and thousands of those are scored at once.
_MEANS = {
    "exact_match": "exact_match",
    "token_f1": "token_f1",
    "rouge1": "rouge1",
    "rouge2": "rouge2",
    "rougeL": "rougeL",
    "answer_length": "generated_tokens",
    "ended_by_eos": "ended",
}
NAMES = (
    "exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "bleu", "answer_length",
    "ended_by_eos", "perplexity",
)  # fmt: skip


def summarize(
    samples: Sequence[Sample], *, seed: int, resamples: int = 1000
) -> dict[str, dict[str, float]]:
    """{metric: {"value", "low", "high"}} of a log: corpus values with 95 % intervals.

    Metrics whose keys no sample has are left out (perplexity without `reference_nll`; BLEU and
    ROUGE of a log without them). BLEU is the corpus's, from the texts.

    The interval is the percentile bootstrap (Efron 1979): `resamples` times as many samples are
    drawn with replacement as there are, and of the scores of those corpora 2.5 % lie below `low`
    and 2.5 % above `high`. It says how far the value would move with other questions of the same
    kind, not how far it would with another seed of training. It knows only what it
    has seen: one sample, or a score that is the same in all, gives an interval of width 0. With
    `resamples=0` there are only values.

    Raises:
        ValueError: no samples, or a key that some samples have and others lack.
    """
    groups = _additive(samples)
    summary = {name: {"value": float(_score(name, g.sum(axis=0)))} for name, g in groups.items()}
    if resamples:
        [draws] = _resampled([groups], len(samples), seed, resamples)
        for name, totals in draws.items():
            low, high = _interval(_score(name, totals))
            summary[name] |= {"low": low, "high": high}
    return summary


def compare(
    a: Sequence[Sample], b: Sequence[Sample], *, seed: int, resamples: int = 1000
) -> dict[str, dict[str, float]]:
    """{metric: {"value_a", "value_b", "difference", "low", "high", "p"}} of two logs.

    `difference` is b - a; `low` and `high` are its 95 % interval by the paired percentile
    bootstrap: each resample draws the same questions for a and b.

    `p` is the two-sided bootstrap p-value of "there is no difference", the one that belongs to
    these intervals (Efron & Tibshirani 1993, ch. 15 and 16): twice the share of resampled
    differences on the rarer side of 0, where those that are 0 count for both sides; one is added to
    both counts, so that p is never 0 and at least 2 / (resamples + 1); at most 1.

    Metrics that one of the logs lacks are left out. So is perplexity if the logs differ in
    `reference_tokens`: then the models cut the same text into other tokens, and a mean per token
    compares nothing.

    Raises:
        ValueError: no samples, or not the same questions and references in the same order.
    """
    if resamples < 1:
        raise ValueError(f"a comparison needs at least 1 resample, found {resamples}")
    _check_same_questions(a, b)
    groups_a, groups_b = _additive(a), _additive(b)
    common = [name for name in groups_a if name in groups_b]
    if any(x.get("reference_tokens") != y.get("reference_tokens") for x, y in zip(a, b)):
        common = [name for name in common if name != "perplexity"]
    if not common:
        raise ValueError("the logs have no score in common")
    groups_a, groups_b = ({name: g[name] for name in common} for g in (groups_a, groups_b))
    draws_a, draws_b = _resampled([groups_a, groups_b], len(a), seed, resamples)
    result = {}
    for name in common:
        value_a = float(_score(name, groups_a[name].sum(axis=0)))
        value_b = float(_score(name, groups_b[name].sum(axis=0)))
        differences = _score(name, draws_b[name]) - _score(name, draws_a[name])
        # What is only a matter of rounding is no difference.
        differences[np.abs(differences) < 1e-12] = 0.0
        low, high = _interval(differences)
        rarer = min(int(np.sum(differences <= 0)), int(np.sum(differences >= 0)))
        result[name] = {
            "value_a": value_a,
            "value_b": value_b,
            "difference": value_b - value_a,
            "low": low,
            "high": high,
            "p": min(1.0, 2 * (rarer + 1) / (resamples + 1)),
        }
    return result


def most_changed(
    a: Sequence[Sample], b: Sequence[Sample], n: int
) -> dict[str, list[dict[str, Any]]]:
    """{"better": [...], "worse": [...]}: where token_f1 changed most from a to b, at most n each.

    The greatest change comes first, equal ones in the order of the log; unchanged samples are in
    neither list. Each entry has row, question, reference, generated_a, generated_b, token_f1_a,
    token_f1_b and change (b - a).

    Raises:
        ValueError: no samples, or not the same questions and references in the same order.
    """
    _check_same_questions(a, b)
    entries = [
        {
            "row": x.get("row", index),
            "question": x["question"],
            "reference": x["reference"],
            "generated_a": x["generated"],
            "generated_b": y["generated"],
            "token_f1_a": float(x["token_f1"]),
            "token_f1_b": float(y["token_f1"]),
            "change": float(y["token_f1"] - x["token_f1"]),
        }
        for index, (x, y) in enumerate(zip(a, b))
    ]
    better = sorted((e for e in entries if e["change"] > 0), key=lambda e: -e["change"])
    worse = sorted((e for e in entries if e["change"] < 0), key=lambda e: e["change"])
    return {"better": better[:n], "worse": worse[:n]}


def _check_same_questions(a: Sequence[Sample], b: Sequence[Sample]) -> None:
    for index, (x, y) in enumerate(zip(a, b)):
        for key in ("question", "reference"):
            if x[key] != y[key]:
                raise ValueError(
                    f"the logs do not hold the same questions in the same order: sample {index} "
                    f"(counted from 0) has the {key} {x[key][:80]!r} in the first and "
                    f"{y[key][:80]!r} in the second"
                )
    if len(a) != len(b):
        raise ValueError(
            f"the logs do not hold the same questions: {len(a)} samples in the first and "
            f"{len(b)} in the second; sample {min(len(a), len(b))} (counted from 0) is in one only"
        )


def _additive(samples: Sequence[Sample]) -> dict[str, Array]:
    """{metric: [N, k]}: for each metric that the samples have, the numbers that it is a sum of."""
    if not samples:
        raise ValueError("no samples: there is nothing to score")
    groups: dict[str, Array] = {}
    for name in NAMES:
        if name == "bleu":
            # The key says that BLEU is wanted; a corpus's BLEU is not the mean of its values.
            if _column(samples, "bleu") is not None:
                texts = ([sample[key] for sample in samples] for key in ("generated", "reference"))
                groups[name] = _bleu_counts(*texts)
            continue
        if name == "perplexity":
            above, below = _column(samples, "reference_nll"), _column(samples, "reference_tokens")
        else:
            above, below = _column(samples, _MEANS[name]), np.ones(len(samples))
        if above is not None and below is not None and below.any():
            groups[name] = np.stack([above, below], axis=1)
    if not groups:
        raise ValueError(f"the samples hold no score: their keys are {', '.join(samples[0])}")
    return groups


def _column(samples: Sequence[Sample], key: str) -> Array | None:
    """[N] values of a key; None if no sample has it."""
    lacking = [index for index, sample in enumerate(samples) if key not in sample]
    if len(lacking) == len(samples):
        return None
    if lacking:
        raise ValueError(
            f"{key}: {len(lacking)} of {len(samples)} samples lack it, the first of them is sample "
            f"{lacking[0]} (counted from 0)"
        )
    return np.array([sample[key] for sample in samples], dtype=np.float64)


def _score(name: str, totals: Array) -> Array:
    """[..., k] sums -> [...] values of a metric; NaN where there is nothing to divide by."""
    if name == "bleu":
        return _bleu(totals)
    above, below = totals[..., 0], totals[..., 1]
    quotient = np.where(below > 0, above / np.maximum(below, 1), np.nan)
    return np.exp(np.minimum(quotient, 700.0)) if name == "perplexity" else quotient


def _resampled(
    logs: Sequence[dict[str, Array]], n: int, seed: int, resamples: int
) -> list[dict[str, Array]]:
    """Sums over `resamples` draws of n samples with replacement, the same draws for each log.

    {metric: [N, k]} of each log -> {metric: [resamples, k]} of each log.
    """
    parts = [group for groups in logs for group in groups.values()]
    columns = np.hstack(parts)
    generator = np.random.default_rng(seed)
    totals = np.empty((resamples, columns.shape[1]))
    for row in totals:
        # How often each sample was drawn; one draw at a time needs no [resamples, N] of memory.
        times = np.bincount(generator.integers(n, size=n), minlength=n)
        row[:] = times @ columns
    split = iter(np.split(totals, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1))
    return [{name: next(split) for name in groups} for groups in logs]


def _interval(values: Array) -> tuple[float, float]:
    """The middle 95 % of values; draws without a defined value do not count."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    tail = (100.0 - LEVEL) / 2
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return float(low), float(high)


# ------------------------------------------------------------------------------------- as text


def table(summary: dict[str, Any]) -> str:
    """The corpus scores with their 95 % intervals, for the console."""
    rows = [f"{'metric':<18}{'value':>9}   95 % interval"]
    for name, entry in summary.items():
        interval = f"{entry['low']:.4g} to {entry['high']:.4g}"
        rows.append(f"{name:<18}{entry['value']:>9.4g}   {interval}")
    return "\n".join(rows)


COMPARED_SAMPLES = 5


def compare_logs(logs: list[Path], seed: int) -> str:
    """Finished logs side by side, each against the first by a paired bootstrap.

    Raises:
        UserError: a log that cannot be read, or logs of different questions.
    """
    if len(logs) < 2:
        raise UserError("--compare: found one log; allowed: two or more")
    contents = [_read_log(log) for log in logs]
    names = [f"{letter}: {log}" for letter, log in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", logs)]
    parts = [*names, ""]
    for name, other in zip(names[1:], contents[1:]):
        letter = name[0]
        try:
            differences = compare(contents[0], other, seed=seed)
            changed = most_changed(contents[0], other, COMPARED_SAMPLES)
        except ValueError as error:
            raise UserError(f"{logs[0]} and {name[3:]} cannot be compared: {error}") from None
        parts.append(
            f"{'metric':<14}{'A':>9}{letter:>9}{letter + ' - A':>11}   95 % interval        p"
        )
        for metric, entry in differences.items():
            interval = f"{entry['low']:+.4g} to {entry['high']:+.4g}"
            parts.append(
                f"{metric:<14}{entry['value_a']:>9.4g}{entry['value_b']:>9.4g}"
                f"{entry['difference']:>+11.4g}   {interval:<20} {entry['p']:.3f}"
            )
        for kind in ("better", "worse"):
            parts.append(
                f"\n{letter} is {kind} most in:"
                if changed[kind]
                else f"\n{letter} is {kind} in none"
            )
            for entry in changed[kind]:
                parts.append(
                    f"  {entry['question']}\n    expected {entry['reference']!r}; A "
                    f"{entry['generated_a']!r}; {letter} {entry['generated_b']!r}"
                )
        parts.append("")
    return "\n".join(parts).rstrip()


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        records = [None]
    needed = {"question", "reference", "generated", "token_f1"}
    if not all(isinstance(record, dict) and needed <= record.keys() for record in records):
        raise UserError(f"{path}: not a log of answers, as `test` writes one")
    return records
