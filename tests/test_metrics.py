"""Scores: values by hand and published ones, the reference packages, intervals, comparisons."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from extras import metrics

# Nothing here may rely on warnings being ignored.
pytestmark = pytest.mark.filterwarnings("error")

SCORES = ("exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "bleu")
WORDS = "the a cat dog sat on mat 3 4.5 1,000 , . red-hot don't (big) $5 ####".split()


def text(source: random.Random, shortest: int, longest: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(source.randint(shortest, longest)))


def make_samples(n: int, seed: int = 0, noise: float = 0.3) -> list[dict[str, Any]]:
    """Records as in the log; answers are the references with a share of their words replaced."""
    questions, errors = random.Random(0), random.Random(seed + 1)
    samples = []
    for row in range(n):
        reference = text(questions, 5, 30)
        generated = " ".join(
            errors.choice(WORDS) if errors.random() < noise else word for word in reference.split()
        )
        samples.append(
            {
                "row": row,
                "question": f"Question {row}?",
                "reference": reference,
                "generated": generated,
                **metrics.score_sample(generated, reference),
                "generated_tokens": len(generated),
                "ended": errors.random() < 0.8,
                "reference_nll": errors.uniform(1, 50),
                "reference_tokens": len(reference),
            }
        )
    return samples


def only(values: list[float], key: str = "exact_match") -> list[dict[str, Any]]:
    return [
        {"question": str(i), "reference": "r", "generated": "g", key: value}
        for i, value in enumerate(values)
    ]


# ----------------------------------------------------------------------------- exact match and F1


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("The  Cat,\tsat.\n", "cat sat"),
        ("An apple a day", "apple day"),
        ("theatre banana", "theatre banana"),  # articles only as whole words
        ("1,000 well-known", "1000 wellknown"),
        ("a-b", "ab"),  # punctuation goes before articles are looked for
        ("the", ""),
        ("?!", ""),
        ("", ""),
        ("naïve «été»", "naïve «été»"),  # only ASCII punctuation goes
    ],
)
def test_normalize(given_text: str, expected: str) -> None:
    assert metrics.normalize(given_text) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("Eiffel", "eiffel tower", 0.0),
        ("", "", 1.0),
        (" \n", "", 1.0),
        ("", "eiffel", 0.0),
        ("eiffel", "", 0.0),
        # nothing is left of these by normalisation
        ("A", "A", 1.0),
        ("a.", "A", 1.0),
        ("A", "The", 0.0),
        ("A", "B", 0.0),
        ("A", "", 0.0),
        ("-", "- ", 1.0),
        ("-", "+", 0.0),
        ("-", "", 0.0),
        ("-5", "5", 1.0),  # as in SQuAD: signs are punctuation
    ],
)
def test_exact_match(prediction: str, reference: str, expected: float) -> None:
    assert metrics.exact_match(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # cat sat on mat | cat on mat: 3 common words, 2 * 3 / (4 + 3)
        ("The cat sat on the mat.", "a cat on a mat", 6 / 7),
        # a word counts as often as both have it
        ("x x y", "x z", 2 * 1 / (3 + 2)),
        ("x x y", "x x z", 2 * 2 / (3 + 3)),
        ("x y", "y x", 1.0),  # the order does not matter
        ("x", "y", 0.0),
        ("in 1,000 days", "1000", 1 / 2),
        ("", "", 1.0),
        ("", "x", 0.0),
        ("x", "", 0.0),
        ("A", "A", 1.0),
        ("a cat", "A", 0.0),
        ("-", "+", 0.0),
    ],
)
def test_token_f1(prediction: str, reference: str, expected: float) -> None:
    assert metrics.token_f1(prediction, reference) == pytest.approx(expected, abs=1e-15)


# ------------------------------------------------------------------------------------------- BLEU


def bleu(predictions: list[str], references: list[str]) -> float:
    """A corpus's, as `summarize` gives it."""
    samples = [
        {"generated": prediction, "reference": reference, "bleu": 0.0}
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return metrics.summarize(samples, seed=0, resamples=0)["bleu"]["value"]


def test_bleu_by_hand() -> None:
    # Papineni et al. 2002, example 2: 2 of 7 unigrams are in the reference, clipped; no bigram is.
    # So the numerators of orders 2 to 4 are 1/2, 1/4, 1/8, over 6, 5 and 4 n-grams.
    found = bleu(["the the the the the the the"], ["The cat is on the mat"])
    assert found == pytest.approx((1 / 7 * 1 / 12 * 1 / 20 * 1 / 32) ** 0.25, abs=1e-12)
    found = bleu(["the the the the the the the"], ["the cat is on the mat"])
    assert found == pytest.approx((2 / 7 * 1 / 12 * 1 / 20 * 1 / 32) ** 0.25, abs=1e-12)
    # All n-grams match, 4 words for 6: only the brevity penalty is left.
    found = bleu(["the cat is on"], ["the cat is on the mat"])
    assert found == pytest.approx(math.exp(1 - 6 / 4), abs=1e-12)
    # Counts are summed over the corpus: 5 + 4 of 10 words, 4 + 2 of 8 pairs, 3 of 6, 2 of 4.
    found = bleu(["a b c d e", "a b x d e"], ["a b c d e", "a b c d e"])
    assert found == pytest.approx((9 / 10 * 6 / 8 * 3 / 6 * 2 / 4) ** 0.25, abs=1e-12)


def test_bleu_published() -> None:
    # The example in the documentation of nltk's SmoothingFunction, which gives 0.4118...
    prediction = (
        "It is a guide to action which ensures that the military always obeys the commands "
        "of the party"
    )
    reference = (
        "It is a guide to action that ensures that the military will forever heed Party commands"
    )
    assert bleu([prediction], [reference]) == pytest.approx(0.4118, abs=1e-4)
    assert metrics.score_sample(prediction, reference)["bleu"] == pytest.approx(0.4118, abs=1e-4)


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("Hello, world.", "Hello , world ."),
        ("costs $1,000.50 (net)", "costs $ 1,000.50 ( net )"),
        ("don't re-do 3-4", "don't re-do 3 - 4"),
        ("trans-\nlation\nnow", "translation now"),
        ("a &lt;b&gt; &amp;", "a < b > &"),
        ("48/2=24\n#### 72", "48 / 2 = 24 # # # # 72"),
        ("a.,5", "a . ,5"),  # one full stop too many for rules that look around
        ("", ""),
    ],
)
def test_bleu_words(given_text: str, expected: str) -> None:
    assert metrics.bleu_words(given_text) == expected.split()


def test_bleu_words_are_those_of_sacrebleu() -> None:
    tokenize = Tokenizer13a()
    source = random.Random(0)
    alphabet = [*"ab5.,-'!&;\n\t (\u2028\u00a0é{~`/:@[<", "&quot;", "&amp;lt;", "<skipped>"]
    for _ in range(20_000):
        line = "".join(source.choice(alphabet) for _ in range(source.randint(0, 12)))
        assert metrics.bleu_words(line) == tokenize(line.rstrip()).split(), repr(line)


@pytest.mark.parametrize(("shortest", "longest"), [(0, 3), (0, 6), (1, 5), (4, 30)])
def test_bleu_is_that_of_sacrebleu(shortest: int, longest: int) -> None:
    source = random.Random(shortest + longest)
    for _ in range(100):
        n = source.randint(1, 20)
        predictions = [text(source, shortest, longest) for _ in range(n)]
        references = [text(source, shortest, longest) for _ in range(n)]
        expected = sacrebleu.corpus_bleu(predictions, [references]).score / 100
        assert bleu(predictions, references) == pytest.approx(expected, abs=1e-9)
        for prediction, reference in zip(predictions, references):
            expected = sacrebleu.sentence_bleu(prediction, [reference]).score / 100
            found = metrics.score_sample(prediction, reference)["bleu"]
            assert found == pytest.approx(expected, abs=1e-9)


def test_bleu_is_that_of_nltk_but_for_short_predictions() -> None:
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu

    def nltk_bleu(predictions: list[str], references: list[str]) -> float:
        return corpus_bleu(
            [[metrics.bleu_words(text)] for text in references],
            [metrics.bleu_words(text) for text in predictions],
            smoothing_function=SmoothingFunction().method3,
        )

    source = random.Random(1)
    for _ in range(100):
        n = source.randint(1, 20)
        predictions = [text(source, 4, 30) for _ in range(n)]
        references = [text(source, 0, 30) for _ in range(n)]
        found = bleu(predictions, references)
        assert found == pytest.approx(nltk_bleu(predictions, references), abs=1e-9)
    # nltk counts a 3-gram and a 4-gram in "a b"; there is none.
    assert bleu(["a b", "a b c d"], ["a b", "a b c d"]) == 1.0
    assert nltk_bleu(["a b", "a b c d"], ["a b", "a b c d"]) < 1.0


def test_bleu_of_empty_and_short_texts() -> None:
    assert bleu([""], ["a b c d"]) == 0.0
    assert bleu(["", ""], ["", ""]) == 0.0
    assert bleu(["a b c d"], [""]) == 0.0
    assert bleu(["a b c"], ["a b c"]) == 0.0  # no 4-gram in the corpus
    assert bleu(["", "a b c d"], ["a", "a b c d"]) == pytest.approx(math.exp(1 - 5 / 4))


# ----------------------------------------------------------------------------------- score_sample


def test_rouge_by_hand() -> None:
    # The example in the README of rouge-score. 6 common words of 8 and 9; 2 common pairs of 7 and
    # 8; longest common subsequence: the quick brown jumps the.
    scores = metrics.score_sample(
        "The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog"
    )
    assert scores["rouge1"] == pytest.approx(2 * 6 / 17)
    assert scores["rouge2"] == pytest.approx(2 * 2 / 15)
    assert scores["rougeL"] == pytest.approx(2 * 5 / 17)
    # Stemming is on.
    assert metrics.score_sample("jumping", "jumped")["rouge1"] == 1.0
    # As documented: words are of ASCII letters and digits.
    assert metrics.score_sample("кошка", "кошка")["rouge1"] == 0.0


def test_rouge_is_that_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    source = random.Random(2)
    for _ in range(100):
        prediction, reference = text(source, 0, 20), text(source, 0, 20)
        found = metrics.score_sample(prediction, reference)
        for name, score in scorer.score(target=reference, prediction=prediction).items():
            assert found[name] == score.fmeasure


def test_score_sample_of_empty_and_equal_texts() -> None:
    ones, zeros = dict.fromkeys(SCORES, 1.0), dict.fromkeys(SCORES, 0.0)
    assert metrics.score_sample("Paris", "Paris") == {**ones, "rouge2": 0.0}  # no pair of words
    assert metrics.score_sample("in old Paris", "in old Paris") == ones
    assert metrics.score_sample("", "Paris") == zeros
    assert metrics.score_sample("Paris", "") == zeros
    assert metrics.score_sample("", "") == {**zeros, "exact_match": 1.0, "token_f1": 1.0}


any_text = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=60),  # lone surrogates as well
    st.lists(st.sampled_from([*WORDS, "A", "-", "\u2028", "ß", "İ"]), max_size=12).map(" ".join),
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(any_text, any_text)
def test_any_texts_have_scores_in_range(prediction: str, reference: str) -> None:
    scores = metrics.score_sample(prediction, reference)
    assert tuple(scores) == SCORES
    assert all(type(score) is float and 0 <= score <= 1 for score in scores.values())
    assert 0 <= bleu([prediction], [reference]) <= 1
    assert scores["exact_match"] in (0.0, 1.0)
    assert scores["exact_match"] <= scores["token_f1"]
    assert scores["token_f1"] == metrics.token_f1(reference, prediction)
    assert metrics.exact_match(prediction, prediction) == 1.0


# -------------------------------------------------------------------------------------- summarize


def test_summary_values() -> None:
    samples = make_samples(40)
    summary = metrics.summarize(samples, seed=1)
    assert tuple(summary) == metrics.NAMES
    for name in ("exact_match", "token_f1", "rouge1", "rouge2", "rougeL"):
        assert summary[name]["value"] == pytest.approx(np.mean([s[name] for s in samples]))
    predictions, references = ([s[key] for s in samples] for key in ("generated", "reference"))
    expected = sacrebleu.corpus_bleu(predictions, [references]).score / 100
    assert summary["bleu"]["value"] == pytest.approx(expected, abs=1e-9)
    lengths = [s["generated_tokens"] for s in samples]
    assert summary["answer_length"]["value"] == pytest.approx(np.mean(lengths))
    assert summary["ended_by_eos"]["value"] == pytest.approx(np.mean([s["ended"] for s in samples]))
    # By tokens, not by samples.
    nll, tokens = (sum(s[key] for s in samples) for key in ("reference_nll", "reference_tokens"))
    assert summary["perplexity"]["value"] == pytest.approx(math.exp(nll / tokens))
    for entry in summary.values():
        assert all(type(number) is float for number in entry.values())
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert entry["low"] < entry["high"]


def test_summary_depends_on_nothing_but_seed_and_samples() -> None:
    samples = make_samples(20)
    np.random.seed(0)  # somebody else's generator: not used, not touched
    expected = np.random.random()
    np.random.seed(0)
    assert metrics.summarize(samples, seed=1) == metrics.summarize(samples, seed=1)
    assert np.random.random() == expected
    assert metrics.summarize(samples, seed=1) != metrics.summarize(samples, seed=2)


def test_interval_of_bleu_is_that_of_resampled_corpora() -> None:
    samples = make_samples(15)
    generator = np.random.default_rng(3)
    scores = []
    for _ in range(200):
        drawn = [samples[i] for i in generator.integers(15, size=15)]
        predictions, references = ([s[key] for s in drawn] for key in ("generated", "reference"))
        scores.append(sacrebleu.corpus_bleu(predictions, [references]).score / 100)
    low, high = np.percentile(scores, [2.5, 97.5])
    entry = metrics.summarize(samples, seed=3, resamples=200)["bleu"]
    assert entry["low"] == pytest.approx(low, abs=1e-9)
    assert entry["high"] == pytest.approx(high, abs=1e-9)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        values = (generator.random(100) < 0.4).astype(float).tolist()
        entry = metrics.summarize(only(values), seed=seed, resamples=200)["exact_match"]
        covered += entry["low"] <= 0.4 <= entry["high"]
    assert 0.90 <= covered / 300 <= 0.98  # the standard error of the share is 0.013


def test_interval_has_the_width_of_the_normal_approximation() -> None:
    values = [1.0] * 400 + [0.0] * 600
    entry = metrics.summarize(only(values), seed=0, resamples=4000)["exact_match"]
    width = 2 * 1.96 * math.sqrt(0.4 * 0.6 / 1000)
    assert entry["high"] - entry["low"] == pytest.approx(width, rel=0.1)


def test_summary_of_one_sample_and_of_none() -> None:
    [sample] = make_samples(1)
    for entry in metrics.summarize([sample], seed=0, resamples=50).values():
        assert entry["low"] == pytest.approx(entry["value"]) == entry["high"]
    with pytest.raises(ValueError, match="no samples"):
        metrics.summarize([], seed=0)
    with pytest.raises(ValueError, match="hold no score"):
        metrics.summarize([{"question": "q"}], seed=0)


def test_summary_has_what_the_samples_have() -> None:
    samples = make_samples(5)
    for sample in samples:
        for key in ("bleu", "rouge1", "reference_nll", "generated_tokens"):
            del sample[key]
    names = set(metrics.summarize(samples, seed=0, resamples=10))
    assert names == {"exact_match", "token_f1", "rouge2", "rougeL", "ended_by_eos"}
    del samples[3]["rouge2"]
    with pytest.raises(ValueError, match=r"rouge2: 1 of 5 samples lack it.*sample 3"):
        metrics.summarize(samples, seed=0)
    values = metrics.summarize(make_samples(5), seed=0, resamples=0)
    assert all(set(entry) == {"value"} for entry in values.values())


def test_perplexity_of_degenerate_references() -> None:
    samples = make_samples(3)
    for sample in samples:
        sample |= {"reference_nll": 0.0, "reference_tokens": 0}
    assert "perplexity" not in metrics.summarize(samples, seed=0)  # nothing to divide by
    samples[0] |= {"reference_nll": 2.0, "reference_tokens": 1}
    # Some resamples hold no token: they have no perplexity, and do not count.
    entry = metrics.summarize(samples, seed=0)["perplexity"]
    assert entry == pytest.approx(dict.fromkeys(("value", "low", "high"), math.exp(2)))
    samples[0]["reference_nll"] = 1e9
    assert math.isfinite(metrics.summarize(samples, seed=0)["perplexity"]["value"])
    samples[0]["reference_nll"] = float("nan")
    entry = metrics.summarize(samples, seed=0)["perplexity"]
    assert all(math.isnan(number) for number in entry.values())


# ---------------------------------------------------------------------------------------- compare


def test_compare_with_itself() -> None:
    samples = make_samples(30)
    for entry in metrics.compare(samples, list(samples), seed=0, resamples=200).values():
        assert entry["value_a"] == entry["value_b"]
        assert entry["difference"] == entry["low"] == entry["high"] == 0
        assert entry["p"] == 1.0


def test_rounding_is_no_difference() -> None:
    a, b = only([0.3] * 30, "token_f1"), only([0.1 + 0.2] * 30, "token_f1")
    entry = metrics.compare(a, b, seed=0, resamples=50)["token_f1"]
    assert (entry["low"], entry["high"], entry["p"]) == (0.0, 0.0, 1.0)


def test_compare_two_models() -> None:
    worse, better = make_samples(200, noise=0.6), make_samples(200, noise=0.2)
    result = metrics.compare(worse, better, seed=0)
    assert tuple(result) == metrics.NAMES
    for name in ("token_f1", "rouge1", "rouge2", "rougeL", "bleu"):
        entry = result[name]
        assert entry["difference"] == entry["value_b"] - entry["value_a"]
        assert 0 < entry["low"] < entry["difference"] < entry["high"]
        assert entry["p"] == pytest.approx(2 / 1001)  # the least there is
        for side, log in (("value_a", worse), ("value_b", better)):
            expected = metrics.summarize(log, seed=0, resamples=0)[name]["value"]
            assert entry[side] == expected
    swapped = metrics.compare(better, worse, seed=0)
    for name, entry in result.items():
        assert swapped[name]["difference"] == -entry["difference"]
        assert swapped[name]["low"] == pytest.approx(-entry["high"])
        assert swapped[name]["high"] == pytest.approx(-entry["low"])
        assert swapped[name]["p"] == entry["p"]
    assert result == metrics.compare(worse, better, seed=0)


def test_compare_is_paired() -> None:
    # b is always 0.01 better; unpaired intervals of values that vary by 0.3 would hide that.
    values = np.random.default_rng(0).random(50)
    a, b = only(values.tolist(), "token_f1"), only((values + 0.01).tolist(), "token_f1")
    entry = metrics.compare(a, b, seed=0)["token_f1"]
    assert entry["low"] == pytest.approx(0.01) == entry["high"]
    assert entry["p"] < 0.01


def test_p_value_is_rarely_small_without_a_difference() -> None:
    generator = np.random.default_rng(0)
    small = 0
    for seed in range(300):
        a, b = (only(generator.random(50).tolist(), "token_f1") for _ in range(2))
        small += metrics.compare(a, b, seed=seed, resamples=200)["token_f1"]["p"] < 0.05
    assert 0.02 <= small / 300 <= 0.10


def test_compare_refuses_other_questions() -> None:
    a = make_samples(5)
    with pytest.raises(ValueError, match=r"sample 2 .* question 'Question 2\?' .* 'other'"):
        metrics.compare(a, [*a[:2], {**a[2], "question": "other"}, *a[3:]], seed=0)
    with pytest.raises(ValueError, match=r"sample 4 .* has the reference"):
        metrics.compare(a, [*a[:4], {**a[4], "reference": "other"}], seed=0)
    with pytest.raises(ValueError, match=r"sample 0 .* question"):
        metrics.compare(a, a[::-1], seed=0)
    with pytest.raises(ValueError, match=r"5 samples .* 3 in the second; sample 3"):
        metrics.compare(a, a[:3], seed=0)
    with pytest.raises(ValueError, match="no samples"):
        metrics.compare([], [], seed=0)
    with pytest.raises(ValueError, match="at least 1 resample"):
        metrics.compare(a, a, seed=0, resamples=0)
    with pytest.raises(ValueError, match="no score in common"):
        metrics.compare(only([1.0]), only([1.0], "rouge1"), seed=0)


def test_compare_leaves_out_what_cannot_be_compared() -> None:
    a, b = make_samples(5), make_samples(5, seed=7)
    del b[2]["reference_nll"], b[2]["reference_tokens"]
    with pytest.raises(ValueError, match="reference_nll"):
        metrics.compare(a, b, seed=0)
    b = make_samples(5, seed=7)
    assert "perplexity" in metrics.compare(a, b, seed=0, resamples=10)
    b[2]["reference_tokens"] += 1  # another tokenizer
    assert "perplexity" not in metrics.compare(a, b, seed=0, resamples=10)
    for sample in b:
        del sample["rouge1"]
    assert "rouge1" not in metrics.compare(a, b, seed=0, resamples=10)


def test_most_changed() -> None:
    a = only([0.5, 0.5, 0.5, 0.5, 0.5, 0.5], "token_f1")
    b = only([0.5, 0.9, 0.1, 0.6, 1.0, 0.6], "token_f1")
    for sample in b:
        sample["generated"] = "new"
    a[4]["row"] = 17
    changed = metrics.most_changed(a, b, 3)
    assert [entry["question"] for entry in changed["better"]] == ["4", "1", "3"]
    assert [entry["question"] for entry in changed["worse"]] == ["2"]
    assert changed["better"][0] == {
        "row": 17,
        "question": "4",
        "reference": "r",
        "generated_a": "g",
        "generated_b": "new",
        "token_f1_a": 0.5,
        "token_f1_b": 1.0,
        "change": 0.5,
    }
    assert metrics.most_changed(a, a, 3) == {"better": [], "worse": []}
    with pytest.raises(ValueError, match="6 samples"):
        metrics.most_changed(a, b[:5], 3)


def test_import_is_light() -> None:
    heavy = "{'torch', 'nltk', 'rouge_score'}"
    code = f"import sys; from extras import metrics; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
