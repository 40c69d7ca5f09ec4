"""The scores and answers of a test as one HTML file: no network, no scripts from elsewhere.

Here is what the page says, in report.html.jinja how it looks. Whatever a model has written is text
there and nothing else: Jinja escapes every value, and the page's Content-Security-Policy lets the
browser run the template's one script and one style sheet, known by their hashes, and load nothing.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from checkpoint import write_file

# Name in the summary: heading, definition.
SCORES = {
    "exact_match": ("Exact match", "share of answers equal to the reference after normalisation"),
    "token_f1": ("Token F1", "mean overlap of words with the reference, after normalisation"),
    "rouge1": ("ROUGE-1", "mean F-measure of common words, stemmed"),
    "rouge2": ("ROUGE-2", "mean F-measure of common word pairs, stemmed"),
    "rougeL": ("ROUGE-L", "mean F-measure of the longest common subsequence, stemmed"),
    "bleu": ("BLEU-4", "of the whole corpus, 13a words, NIST smoothing"),
    "ended_by_eos": ("Ended by EOS", "share of answers that the model ended by itself"),
    "answer_length": ("Answer length", "mean number of generated tokens"),
    "perplexity": ("Perplexity", "of the reference answers, per token"),
}
BETWEEN_0_AND_1 = ("exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "bleu", "ended_by_eos")
HISTOGRAMS = ("token_f1", "rougeL")
BINS = 20
# Heading of a numeric column of the table, key in the sample, decimals.
NUMBERS = (("F1", "token_f1", 2), ("ROUGE-L", "rougeL", 2), ("Tokens", "generated_tokens", 0))
# Marking differences goes through all pairs of equal words again and again: up to 10 s for two
# texts of 1,000 words that only repeat two. Ordinary ones of that length have some 10,000 pairs.
MAX_EQUAL_PAIRS = 20_000

# A text in parts, in order, each with whether it is marked as different.
Parts = list[tuple[bool, str]]

TEMPLATE = Path(__file__).with_name("report.html.jinja")
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATE.parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,  # a name that is wrong is an error, not an empty cell
    trim_blocks=True,  # with the next one: a tag of Jinja on its own line leaves no line behind
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def write_report(
    path: str | os.PathLike[str],
    title: str,
    summary: Mapping[str, Mapping[str, float]],
    samples: Sequence[Mapping[str, Any]],
) -> None:
    """Write the report of a test to `path`, atomically: the old file or the new one, no half.

    Args:
        summary: from `metrics.summarize`; entries without "low" and "high" are shown without.
        samples: the records of the log. What a record must have: question, reference, generated.
            Scores, generated_tokens and ended are shown if the first record has them.

    Raises:
        OSError: the file cannot be written.
    """
    write_file(Path(path), _page(title, summary, samples))


def _page(
    title: str,
    summary: Mapping[str, Mapping[str, float]],
    samples: Sequence[Mapping[str, Any]],
) -> bytes:
    known = [name for name in SCORES if name in summary]
    others = [name for name in summary if name not in SCORES]
    columns = [column for column in NUMBERS if samples and column[1] in samples[0]]
    page = ENVIRONMENT.get_template(TEMPLATE.name).render(
        csp_hash=_csp_hash,
        title=title,
        count=f"{len(samples):,}",
        scores=[_score(name, summary[name]) for name in [*known, *others]],
        histograms=[
            _histogram(SCORES[name][0], [float(sample[name]) for sample in samples])
            for name in HISTOGRAMS
            if samples and name in samples[0]
        ],
        columns=[heading for heading, _, _ in columns],
        # One at a time: the marked words of thousands of answers need not be in memory together.
        answers=(_answer(index, sample, columns) for index, sample in enumerate(samples)),
    )
    return _encoded(page)


def _csp_hash(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style sheet."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _encoded(page: str) -> bytes:
    """The page as UTF-8, with a stand-in for each of three things that no escaping saves.

    HTML cannot hold NUL: its symbol U+2400 is shown. A bare carriage return would be read as a line
    feed: a character reference keeps it. UTF-8 cannot hold half a surrogate pair: its escape such
    as \\ud800 is shown. All this is done to the whole page, so that no text can be forgotten, and
    after Jinja's escaping, which would make text of the reference. Script and style sheet have none
    of the three, so their hashes still hold.
    """
    page = page.replace("\0", "\u2400").replace("\r", "&#13;")
    return page.encode("utf-8", "backslashreplace")


def _score(name: str, entry: Mapping[str, float]) -> dict[str, Any]:
    """A row of the table of scores; `share` is what to draw as a bar from 0 to 1, if anything."""
    heading, definition = SCORES.get(name, (name, ""))
    interval = f"[{_number(entry['low'])}, {_number(entry['high'])}]" if "low" in entry else ""
    return {
        "heading": heading,
        "definition": definition,
        "value": _number(entry["value"]),
        "interval": interval,
        "share": entry if name in BETWEEN_0_AND_1 and math.isfinite(entry["value"]) else None,
    }


def _number(value: float, decimals: int | None = None) -> str:
    """A number for reading: three decimals below 10, fewer above; a dash if it is none."""
    if not math.isfinite(value):
        return "\u2013"
    if decimals is None:
        decimals = 3 if abs(value) < 10 else 1
    return f"{value:,.{decimals}f}"


def _histogram(heading: str, values: Iterable[float]) -> dict[str, Any]:
    """How many answers have a score in each twentieth from 0 to 1; the last one includes 1.

    A bar is its height as a share of the highest one, and its label.
    """
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, int(value * BINS))] += 1
    highest = max(counts)
    return {
        "heading": heading,
        "highest": f"{highest:,}",
        "bars": [
            (
                number / max(1, highest),
                f"{index / BINS:.2f} to {(index + 1) / BINS:.2f}: {number:,} answers",
            )
            for index, number in enumerate(counts)
        ],
    }


def _answer(
    index: int, sample: Mapping[str, Any], columns: Sequence[tuple[str, str, int]]
) -> dict[str, Any]:
    """A row of the table of answers; a number is its value, to sort by, and its text."""
    classes = []
    if "exact_match" in sample:
        classes.append("right-answer" if sample["exact_match"] == 1 else "wrong-answer")
    if not sample.get("ended", True):
        classes.append("unended")
    values = [(float(sample[key]), decimals) for _, key, decimals in columns]
    reference, generated = differences(sample["reference"], sample["generated"])
    return {
        "row": int(sample.get("row", index)),
        "classes": classes,
        "numbers": [(value, _number(value, decimals)) for value, decimals in values],
        "question": sample["question"],
        "reference": reference,
        "generated": generated,
    }


def differences(reference: str, generated: str) -> tuple[Parts, Parts]:
    """Both texts in parts; marked is what only the reference has, or only the answer.

    Words are what whitespace separates, compared as they stand. All parts of a text together are
    that text. Texts too long and repetitive to be compared in a moment come without marks.
    """
    left, right = (list(re.finditer(r"\S+", text)) for text in (reference, generated))
    left_words, right_words = [word.group() for word in left], [word.group() for word in right]
    often = Counter(right_words)
    if sum(often[word] for word in left_words) > MAX_EQUAL_PAIRS:
        return [(False, reference)], [(False, generated)]
    matcher = difflib.SequenceMatcher(None, left_words, right_words, autojunk=False)
    changes = [change for change in matcher.get_opcodes() if change[0] != "equal"]
    return (
        _marked(reference, left, [(start, end) for _, start, end, _, _ in changes]),
        _marked(generated, right, [(start, end) for _, _, _, start, end in changes]),
    )


def _marked(text: str, words: list[re.Match[str]], ranges: list[tuple[int, int]]) -> Parts:
    """`text` in parts, with a mark on each range of words."""
    parts, place = [], 0
    for start, end in ranges:
        if start < end:
            first, last = words[start].start(), words[end - 1].end()
            parts += [(False, text[place:first]), (True, text[first:last])]
            place = last
    return [*parts, (False, text[place:])]
