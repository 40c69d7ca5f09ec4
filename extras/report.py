"""The scores and answers of a test as one HTML file: no network, no scripts from elsewhere.

Whatever a model has written is text here and nothing else: every text goes through `_text`, and the
page's Content-Security-Policy lets the browser run the one script and the one style sheet below,
known by their hashes, and load nothing.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import html
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --ink: #1a1d21; --soft: #5c6570; --line: #dfe3e8;
  --accent: #2563a8; --bar: #7ba7d7; --track: #e6eaef;
  --ins: #d9f0dd; --ins-ink: #0b5a22; --del: #fbe0df; --del-ink: #9a1b16;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1c2024; --ink: #e4e7ea; --soft: #9aa4af; --line: #31373d;
    --accent: #7db4ee; --bar: #4a7db5; --track: #2a3036;
    --ins: #163a22; --ins-ink: #9be0af; --del: #47201f; --del-ink: #f3aaa5;
  }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; padding: 1.5rem; max-width: 100rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1rem; margin: 0 0 .75rem }
.soft { color: var(--soft) }
.top { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 1rem;
       margin: 1rem 0 }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem }
.charts { display: grid; gap: 1rem; align-content: start }
@media (max-width: 60rem) { .top { grid-template-columns: minmax(0, 1fr) } }
table { border-collapse: collapse; width: 100% }
th { text-align: start; font-weight: 600 }
.scores td, .scores th { padding: .3rem .75rem .3rem 0; vertical-align: middle }
.scores tr + tr > * { border-top: 1px solid var(--line) }
.scores small { display: block; font-weight: 400; color: var(--soft) }
.number { font-variant-numeric: tabular-nums; text-align: end; white-space: nowrap }
.scores th.number, .scores td.number { text-align: end }
.scores .value { font-weight: 600; font-size: 1.05rem }
.scores .chart { width: 34%; padding-inline-end: 0 }
@media (max-width: 40rem) { .scores .chart { display: none } }
svg { display: block; width: 100%; height: auto }
.track { fill: var(--track) } .bar { fill: var(--bar) } .whisker { stroke: var(--ink) }
.axis { stroke: var(--soft) } svg text { fill: var(--soft); font-size: 11px }
.controls { display: flex; flex-wrap: wrap; gap: .75rem; align-items: center;
            margin-bottom: .75rem }
.controls[hidden] { display: none }
.controls input, .controls select, #more {
  font: inherit; color: inherit; background: var(--page); border: 1px solid var(--line);
  border-radius: 6px; padding: .35rem .6rem;
}
.controls input { flex: 1 1 16rem; max-width: 32rem }
#more { display: block; margin: 1rem auto 0; cursor: pointer }
#more[hidden] { display: none }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px }
ins, del { text-decoration: none; border-radius: 3px; padding: 0 .1em;
           box-decoration-break: clone; -webkit-box-decoration-break: clone }
ins { background: var(--ins); color: var(--ins-ink) }
del { background: var(--del); color: var(--del-ink) }
.answers { table-layout: fixed; min-width: 60rem; border-collapse: separate; border-spacing: 0 }
/* Only where the table is too wide: inside a box that scrolls, its heading would not stick. */
@media (max-width: 66rem) { .wide { overflow-x: auto } }
.answers thead th { position: sticky; top: 0; background: var(--card); padding: 0;
                    border-bottom: 2px solid var(--line) }
.answers thead button { all: unset; box-sizing: border-box; cursor: pointer; display: block;
                        width: 100%; padding: .4rem .5rem; color: var(--accent);
                        white-space: nowrap }
.answers thead button:focus-visible { outline: 2px solid var(--accent) }
.answers thead .number button { text-align: end }
[aria-sort="ascending"] button::after { content: " \\2191" }
[aria-sort="descending"] button::after { content: " \\2193" }
.answers tbody td { padding: .5rem; vertical-align: top; border-bottom: 1px solid var(--line) }
.answers .text { white-space: pre-wrap; overflow-wrap: anywhere }
.answers .narrow { width: 5.5rem }
.right { color: var(--ins-ink) } .wrong { color: var(--del-ink) }
.badge { display: inline-block; font-size: .8rem; color: var(--soft);
         border: 1px solid var(--line); border-radius: 4px; padding: 0 .3rem; margin-top: .25rem;
         white-space: nowrap }
"""

SCRIPT = """
"use strict";
{
  const STEP = 100;  // rows on the page at first, and more with each click
  const table = document.getElementById("answers");
  const body = table.tBodies[0];
  const search = document.getElementById("search");
  const filter = document.getElementById("filter");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const headings = Array.from(table.tHead.rows[0].cells);
  const collator = new Intl.Collator(undefined, { numeric: true });
  let rows = Array.from(body.rows, (row, place) => ({
    row,
    place,
    text: Array.from(row.querySelectorAll(".text"), (cell) => cell.textContent)
      .join("\\n").toLowerCase(),
    keys: Array.from(row.cells, (cell) =>
      "number" in cell.dataset ? Number(cell.dataset.number) : cell.textContent),
  }));
  let limit = STEP;

  function show() {
    const wanted = search.value.trim().toLowerCase();
    const kind = filter.value;
    const found = rows.filter(({ row, text }) =>
      (kind === "all" || row.classList.contains(kind)) && text.includes(wanted));
    // Only rows that are seen are in the page: laying out thousands would make it slow.
    body.replaceChildren(...found.slice(0, limit).map(({ row }) => row));
    const left = found.length - limit;
    more.hidden = left <= 0;
    more.textContent = `Show ${Math.min(STEP, left)} more`;
    count.textContent = `${found.length.toLocaleString("en")} of ` +
      `${rows.length.toLocaleString("en")} answers`;
  }

  function sort(column) {
    const heading = headings[column];
    const numeric = heading.classList.contains("number");
    const before = heading.getAttribute("aria-sort");
    const direction = before === "ascending" ? -1 : 1;
    for (const other of headings) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    const order = numeric ? (a, b) => a - b : collator.compare;
    rows.sort((a, b) =>
      direction * order(a.keys[column], b.keys[column]) || a.place - b.place);
    again();
  }

  function again() {
    limit = STEP;
    show();
  }

  headings.forEach((heading, column) =>
    heading.querySelector("button").addEventListener("click", () => sort(column)));
  let pause;
  search.addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(again, 100);
  });
  filter.addEventListener("change", again);
  more.addEventListener("click", () => {
    limit += STEP;
    show();
  });
  document.getElementById("controls").hidden = false;
  show();
}
"""


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
    write_file(Path(path), _page(title, summary, samples).encode())


def _page(
    title: str,
    summary: Mapping[str, Mapping[str, float]],
    samples: Sequence[Mapping[str, Any]],
) -> str:
    policy = (
        f"default-src 'none'; script-src '{_hash(SCRIPT)}'; style-src '{_hash(STYLE)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    charts = "".join(
        _histogram(SCORES[name][0], [float(sample[name]) for sample in samples])
        for name in HISTOGRAMS
        if samples and name in samples[0]
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1 dir="auto">{_text(title)}</h1>
<div class="soft">{len(samples):,} answers; brackets and lines are 95 % bootstrap intervals</div>
<div class="top">
{_score_table(summary)}
<div class="charts">{charts}</div>
</div>
<section class="card">
<h2>Answers</h2>
<div class="controls" id="controls" hidden>
<input id="search" type="search" placeholder="Search in all texts" aria-label="Search">
<select id="filter" aria-label="Which answers">
<option value="all">All answers</option>
<option value="wrong-answer">Only wrong (no exact match)</option>
<option value="right-answer">Only right (exact match)</option>
<option value="unended">Only those cut off (no EOS)</option>
</select>
<span id="count" class="soft" role="status"></span>
<span class="soft"><del>only in the reference</del> <ins>only in the answer</ins></span>
</div>
<div class="wide">
{_answer_table(samples)}
</div>
<button id="more" type="button" hidden></button>
</section>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style sheet."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(text: str) -> str:
    """Text as HTML that shows it and does nothing else; also inside a quoted attribute.

    Two things that HTML cannot hold are shown by a stand-in: NUL as its symbol U+2400, and half a
    surrogate pair, which no UTF-8 file can hold, as its escape such as \\ud800.
    """
    text = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\u2400")
    # A bare carriage return would be read as a line feed.
    return html.escape(text, quote=True).replace("\r", "&#13;")


def _score_table(summary: Mapping[str, Mapping[str, float]]) -> str:
    known = [name for name in SCORES if name in summary]
    rows = []
    for name in [*known, *(name for name in summary if name not in SCORES)]:
        entry = summary[name]
        heading, definition = SCORES.get(name, (name, ""))
        interval = ""
        if "low" in entry:
            interval = f"[{_number(entry['low'])}, {_number(entry['high'])}]"
        rows.append(
            f'<tr><th scope="row">{_text(heading)}<small>{_text(definition)}</small></th>'
            f'<td class="number value">{_number(entry["value"])}</td>'
            f'<td class="number soft">{interval}</td>'
            f'<td class="chart">{_gauge(entry) if name in BETWEEN_0_AND_1 else ""}</td></tr>'
        )
    return (
        '<section class="card"><h2>Scores</h2><table class="scores"><tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></section>"
    )


def _number(value: float, decimals: int | None = None) -> str:
    """A number for reading: three decimals below 10, fewer above; a dash if it is none."""
    if not math.isfinite(value):
        return "\u2013"
    if decimals is None:
        decimals = 3 if abs(value) < 10 else 1
    return f"{value:,.{decimals}f}"


def _gauge(entry: Mapping[str, float]) -> str:
    """A value from 0 to 1 as a bar, with its interval as a line."""
    if not math.isfinite(entry["value"]):
        return ""
    x = {name: 4 + 192 * number for name, number in entry.items()}
    whisker = ""
    if "low" in entry:
        whisker = (
            f'<path class="whisker" d="M{x["low"]:.1f} 5v8M{x["low"]:.1f} 9H{x["high"]:.1f}'
            f'M{x["high"]:.1f} 5v8"/>'
        )
    return (
        '<svg viewBox="0 0 200 18" aria-hidden="true"><rect class="track" x="4" y="4" width="192" '
        f'height="10" rx="2"/><rect class="bar" x="4" y="4" width="{x["value"] - 4:.1f}" '
        f'height="10" rx="2"/>{whisker}</svg>'
    )


def _histogram(heading: str, values: Iterable[float]) -> str:
    """How many answers have a score in each twentieth from 0 to 1; the last one includes 1."""
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, int(value * BINS))] += 1
    highest = max(counts)
    # 480 x 150: bars from x = 40 to 470, from y = 125 up to 10.
    step = 430 / BINS
    bars = []
    for index, number in enumerate(counts):
        height = 115 * number / max(1, highest)
        label = f"{index / BINS:.2f} to {(index + 1) / BINS:.2f}: {number:,} answers"
        bars.append(
            f'<rect class="bar" x="{40 + index * step + 1:.1f}" y="{125 - height:.1f}" '
            f'width="{step - 2:.1f}" height="{height:.1f}"><title>{label}</title></rect>'
        )
    ticks = "".join(
        f'<text x="{40 + 430 * share / 4:.1f}" y="141" text-anchor="middle">{share / 4:g}</text>'
        for share in range(5)
    )
    return (
        f'<section class="card"><h2>{_text(heading)} of single answers</h2>'
        f'<svg viewBox="0 0 480 150" role="img" aria-label="Histogram of {_text(heading)}">'
        f'{"".join(bars)}<path class="axis" d="M40 125.5H470"/>{ticks}'
        f'<text x="34" y="18" text-anchor="end">{highest:,}</text>'
        '<text x="34" y="128" text-anchor="end">0</text></svg></section>'
    )


def _answer_table(samples: Sequence[Mapping[str, Any]]) -> str:
    shown = [column for column in NUMBERS if samples and column[1] in samples[0]]
    headings = ['<th class="number narrow" aria-sort="ascending">'
                '<button type="button">Row</button></th>']  # fmt: skip
    headings += [
        f'<th class="number narrow" aria-sort="none"><button type="button">{name}</button></th>'
        for name, _, _ in shown
    ]
    headings += [
        f'<th aria-sort="none"><button type="button">{name}</button></th>'
        for name in ("Question", "Reference", "Answer")
    ]
    rows = [_answer_row(index, sample, shown) for index, sample in enumerate(samples)]
    return (
        f'<table class="answers" id="answers"><thead><tr>{"".join(headings)}</tr></thead>\n'
        "<tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
    )


def _answer_row(
    index: int, sample: Mapping[str, Any], shown: Sequence[tuple[str, str, int]]
) -> str:
    classes, verdict = [], ""
    if "exact_match" in sample:
        right = sample["exact_match"] == 1
        classes.append("right-answer" if right else "wrong-answer")
        verdict = (
            '<span class="right" title="exact match">\u2713</span> '
            if right
            else '<span class="wrong" title="no exact match">\u2717</span> '
        )
    badge = ""
    if not sample.get("ended", True):
        classes.append("unended")
        badge = '<br><span class="badge" title="no EOS">cut off</span>'
    row = int(sample.get("row", index))
    cells = [f'<td class="number" data-number="{row}">{verdict}{row}{badge}</td>']
    for _, key, decimals in shown:
        value = float(sample[key])
        cells.append(f'<td class="number" data-number="{value!r}">{_number(value, decimals)}</td>')
    reference, generated = differences(sample["reference"], sample["generated"])
    cells += [
        f'<td dir="auto" class="text">{_text(sample["question"])}</td>',
        f'<td dir="auto" class="text">{reference}</td>',
        f'<td dir="auto" class="text">{generated}</td>',
    ]
    return f'<tr class="{" ".join(classes)}">{"".join(cells)}</tr>'


def differences(reference: str, generated: str) -> tuple[str, str]:
    """Both texts as HTML: words only in the reference in <del>, only in the answer in <ins>.

    Words are what whitespace separates, compared as they stand. The text inside is unchanged.
    Texts too long and repetitive to be compared in a moment come without marks.
    """
    left, right = (list(re.finditer(r"\S+", text)) for text in (reference, generated))
    left_words, right_words = [word.group() for word in left], [word.group() for word in right]
    often = Counter(right_words)
    if sum(often[word] for word in left_words) > MAX_EQUAL_PAIRS:
        return _text(reference), _text(generated)
    matcher = difflib.SequenceMatcher(None, left_words, right_words, autojunk=False)
    changes = [change for change in matcher.get_opcodes() if change[0] != "equal"]
    return (
        _marked(reference, left, [(start, end) for _, start, end, _, _ in changes], "del"),
        _marked(generated, right, [(start, end) for _, _, _, start, end in changes], "ins"),
    )


def _marked(text: str, words: list[re.Match[str]], ranges: list[tuple[int, int]], tag: str) -> str:
    """`text` as HTML with a tag around each range of words."""
    parts, place = [], 0
    for start, end in ranges:
        if start < end:
            first, last = words[start].start(), words[end - 1].end()
            parts.append(_text(text[place:first]))
            parts.append(f"<{tag}>{_text(text[first:last])}</{tag}>")
            place = last
    return "".join(parts) + _text(text[place:])
