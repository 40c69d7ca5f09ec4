"""The HTML report: nothing that a model writes becomes more than text, and the page works."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import random
import re
import shutil
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extras import metrics, report

NASTY = [
    "<script>window.injected = 1; alert(1)</script>",
    "</script><script>window.injected = 1</script>",
    "</td></tr></table><img src=x onerror=\"window.injected = 1; alert('x')\">",
    "<!-- <svg onload=alert(1)> --> <![CDATA[ x ]]>",
    "'\"><style>body { display: none }</style>",
    "javascript:alert(1) &lt;b&gt; &amp; &#60; &notin;",
    "line\u2028separator\u2029paragraph\u0085next",
    "  leading\n\nand trailing  \n",
    "carriage\r\nreturn\rand\ttab \x0b\x0c\x1f\x7f\x80\ufffe\ufeff",
    "right-to-left שלום \u202e override \u2066",
    "${window.injected = 1} {{7*7}} `x` \\u003cscript\\u003e",
    "\U0001f600 e\u0301 \U0010ffff",
]
# What HTML or UTF-8 cannot hold, and what is shown for it.
STAND_INS = {
    "nul \0 byte": "nul \u2400 byte",
    "half \ud83d a pair \udc00": r"half \ud83d a pair \udc00",
}


def sample(row: int, question: str, reference: str, generated: str) -> dict[str, Any]:
    return {
        "row": row,
        "question": question,
        "reference": reference,
        "generated": generated,
        **metrics.score_sample(generated, reference),
        "generated_tokens": len(generated.split()),
        "ended": row % 5 != 4,
    }


class Page(HTMLParser):
    """What is on a page: elements with their attributes, texts of cells, of scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self.cells: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.texts:
            self.texts[tag].append("")
            self.open.append(tag)
        if tag == "td" and dict(attrs).get("class") == "text":
            self.cells.append("")
            self.open.append("td")

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data
        elif self.open:
            self.texts[self.open[-1]][-1] += data


def written(tmp_path: Path, title: str, samples: list[dict[str, Any]]) -> Page:
    path = tmp_path / "report.html"
    report.write_report(path, title, metrics.summarize(samples, seed=0, resamples=20), samples)
    return Page(path.read_bytes().decode("utf-8"))


def marked(reference: str, generated: str) -> list[str]:
    """Both texts as they stand in the HTML of a page."""
    samples = [{"question": "", "reference": reference, "generated": generated}]
    page = report._page("t", {}, samples).decode("utf-8")
    _, *both = re.findall('<td dir="auto" class="text">(.*?)</td>', page, re.DOTALL)
    return both


def test_texts_are_only_text(tmp_path: Path) -> None:
    texts = [*NASTY, *STAND_INS]
    samples = [sample(i, text, text + " reference", text) for i, text in enumerate(texts)]
    page = written(tmp_path, NASTY[0] + NASTY[4], samples)
    shown = [STAND_INS.get(text, text) for text in texts]
    assert page.cells == [cell for text in shown for cell in (text, text + " reference", text)]
    # One title in the head; others belong to the bars of the histograms.
    assert page.texts["title"][0] == NASTY[0] + NASTY[4]
    # One script and one style sheet, which are the template's, untouched.
    template = report.TEMPLATE.read_text("utf-8")
    [script], [style] = page.texts["script"], page.texts["style"]
    for name, text in (("script", script), ("style", style)):
        assert f"{{% set {name} %}}\n{text}{{% endset -%}}" in template
    names = {name for name, _ in page.elements}
    assert not names & {"img", "iframe", "link", "object", "embed", "base", "form", "a"}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert not {"src", "href", "action", "srcset"} & set(attributes)


def test_policy_allows_our_script_and_style_only(tmp_path: Path) -> None:
    page = written(tmp_path, "title", [sample(0, "q", "r", "g")])
    [policy] = [
        attributes["content"] or ""
        for _, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for kind in ("script", "style"):
        digest = hashlib.sha256(page.texts[kind][0].encode()).digest()
        assert rules[f"{kind}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"


def test_differences_by_hand() -> None:
    assert report.differences("the cat sat", "the dog sat") == (
        [(False, "the "), (True, "cat"), (False, " sat")],
        [(False, "the "), (True, "dog"), (False, " sat")],
    )
    assert marked("the cat sat", "the dog sat") == [
        "the <del>cat</del> sat",
        "the <ins>dog</ins> sat",
    ]
    assert marked("a b c d", "a d") == ["a <del>b c</del> d", "a d"]
    assert marked(" a\n", " a\n b <i> ") == [" a\n", " a\n <ins>b &lt;i&gt;</ins> "]
    assert marked("", "x") == ["", "<ins>x</ins>"]
    assert marked("", "") == ["", ""]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.text(st.characters(exclude_categories=()), max_size=60),
    st.text(st.characters(exclude_categories=()), max_size=60)
    | st.lists(st.sampled_from(["a", "<b>", "&amp;", "\r\n"])).map(" ".join),
)
def test_marks_change_no_text(reference: str, generated: str) -> None:
    texts = (reference, generated)
    for text, parts in zip(texts, report.differences(reference, generated)):
        assert "".join(part for _, part in parts) == text
    for text, shown in zip(texts, marked(reference, generated)):
        expected = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\u2400")
        plain = re.sub("</?(ins|del)>", "", shown)
        assert not re.search("[<>\"'\r]", plain)
        assert html.unescape(plain) == expected


def test_texts_too_repetitive_to_compare_in_a_moment_come_without_marks() -> None:
    left = " ".join(str(i % 2) for i in range(2000))
    right = " ".join(str(i // 2 % 2) for i in range(2000))
    assert report.differences(left, right) == ([(False, left)], [(False, right)])


def test_scores_are_shown(tmp_path: Path) -> None:
    summary = {
        "token_f1": {"value": 0.51234, "low": 0.4, "high": 0.6125},
        "perplexity": {"value": float("nan"), "low": float("nan"), "high": float("nan")},
        "answer_length": {"value": 1234.56},
        "<i>mine</i>": {"value": 2.0},
    }
    path = tmp_path / "report.html"
    report.write_report(path, "t", summary, [sample(0, "q", "r", "g")])
    content = path.read_text()
    assert ">0.512<" in content
    assert "[0.400, 0.613]" in content or "[0.400, 0.612]" in content
    assert ">1,234.6<" in content
    assert "&lt;i&gt;mine&lt;/i&gt;" in content
    assert "nan" not in re.sub("<style>.*</style>|<script>.*</script>", "", content, flags=re.S)


def test_stand_ins_are_shown_for_any_text(tmp_path: Path) -> None:
    text = "".join(STAND_INS) + "\r<"
    path = tmp_path / "report.html"
    report.write_report(path, text, {text: {"value": 1.0}}, [sample(0, text, text, "g")])
    shown = "".join(STAND_INS.values()) + "&#13;&lt;"
    # The title in the head and on the page, the name of the score, the question, the reference.
    assert path.read_bytes().decode("utf-8").count(shown) == 5
    assert not set(path.read_bytes()) & set(b"\0\r")


def test_histogram_counts_each_answer_once() -> None:
    scores = [0.0, 0.049, 0.05, 0.5, 0.999, 1.0]
    samples = [
        {"question": "q", "reference": "r", "generated": "g", "token_f1": score} for score in scores
    ]
    drawn = report._page("t", {}, samples).decode("utf-8")
    counts = dict(re.findall(r"<title>(\S+) to \S+: (\d+) answers</title>", drawn))
    assert len(counts) == report.BINS
    assert {start: n for start, n in counts.items() if n != "0"} == {
        "0.00": "2",
        "0.05": "1",
        "0.50": "1",
        "0.95": "2",
    }


def test_samples_without_scores(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report.write_report(path, "t", {}, [{"question": "q", "reference": "r", "generated": "g"}])
    page = Page(path.read_text())
    assert page.cells == ["q", "r", "g"]
    assert "Histogram" not in path.read_text()
    report.write_report(path, "t", {}, [])
    assert Page(path.read_text()).cells == []


def test_report_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    report.write_report(path, "first", {}, [])
    before = path.read_bytes()

    def full(_: int) -> None:
        assert path.read_bytes() == before
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(path, "second", {}, [])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["report.html"]


# ------------------------------------------------------------------------------ in a real browser


@pytest.fixture
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium from PyPI")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--window-size=1500,1300", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium has no sandbox for root, as in containers
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.set_capability("unhandledPromptBehavior", "ignore")
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield session
    finally:
        session.quit()


def wait_for(seconds: float, condition: Any) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.slow
def test_report_in_chromium(browser: Any, tmp_path: Path) -> None:
    from selenium.common.exceptions import NoAlertPresentException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    source = random.Random(0)
    words = "Natalia sold 48 clips to 24 of her friends and half as many in May for $5 .".split()
    nasty = [*NASTY, *STAND_INS]
    samples = []
    for row in range(2000):
        reference = " ".join(source.choice(words) for _ in range(source.randint(10, 60)))
        share = source.choice([0, 0.1, 0.3, 0.8])
        generated = " ".join(
            source.choice(words) if source.random() < share else word for word in reference.split()
        )
        if row < len(nasty):
            generated = nasty[row]
        samples.append(sample(row, f"Question {row}, about clips?", reference, generated))
    path = tmp_path / "report.html"
    summary = metrics.summarize(samples, seed=0)
    report.write_report(path, "outputs/gpt-neo on data/gsm8k [test]", summary, samples)

    def cells(column: int) -> list[str]:
        """textContent of a column of the visible rows; -1 is the answer, 0 the number."""
        return browser.execute_script(
            "return Array.from(document.getElementById('answers').tBodies[0].rows, "
            "row => row.cells[(arguments[0] + row.cells.length) % row.cells.length].textContent)",
            column,
        )

    def numbers() -> list[int]:
        return [int(re.findall(r"\d+", cell)[0]) for cell in cells(0)]

    def count() -> str:
        return browser.find_element(By.ID, "count").text

    def search_for(text: str) -> None:
        """As a person does it; WebDriver's clear() sends no input event."""
        box = browser.find_element(By.ID, "search")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text or Keys.DELETE)

    def sort_by(heading: str) -> None:
        browser.execute_script(
            "Array.from(document.querySelectorAll('#answers thead button'))"
            ".find(button => button.textContent === arguments[0]).click()",
            heading,
        )

    browser.get(path.as_uri())
    # It opens: the controls are there (so our script ran), with the first hundred of all rows.
    assert browser.find_element(By.ID, "search").is_displayed()
    assert count() == "2,000 of 2,000 answers"
    assert numbers() == list(range(100))
    assert cells(-1)[: len(nasty)] == [STAND_INS.get(text, text) for text in nasty]
    assert browser.find_elements(By.CSS_SELECTOR, "td ins, td del")
    browser.find_element(By.ID, "more").click()
    assert numbers() == list(range(200))

    # It sorts: by a number both ways, by a text with numbers in it, and back.
    by_f1 = sorted(range(2000), key=lambda row: samples[row]["token_f1"])
    sort_by("F1")
    assert numbers() == by_f1[:100]
    sort_by("F1")
    by_f1 = sorted(range(2000), key=lambda row: -samples[row]["token_f1"])
    assert numbers() == by_f1[:100]
    [sorted_heading] = browser.find_elements(By.CSS_SELECTOR, '[aria-sort="descending"]')
    assert sorted_heading.text.startswith("F1")
    sort_by("Question")
    assert numbers() == list(range(100))
    sort_by("Question")
    assert numbers() == list(range(1999, 1899, -1))
    sort_by("F1")  # whatever came before, equal ones are in the order of the file
    assert numbers() == sorted(range(2000), key=lambda row: samples[row]["token_f1"])[:100]
    sort_by("Row")
    assert numbers() == list(range(100))

    # It searches, in the texts and not in the numbers beside them.
    search_for("QUESTION 12")
    expected = [row for row in range(2000) if str(row).startswith("12")]
    wait_for(5, lambda: count() == f"{len(expected)} of 2,000 answers")
    assert numbers() == expected[:100]
    assert browser.find_element(By.ID, "more").text == f"Show {len(expected) - 100} more"
    search_for("<script>")
    wait_for(5, lambda: numbers() == [0, 1])
    search_for("\u2717")
    wait_for(5, lambda: count() == "0 of 2,000 answers")
    search_for("no such text")
    wait_for(5, lambda: count() == "0 of 2,000 answers")
    assert numbers() == []
    search_for("")
    wait_for(5, lambda: count() == "2,000 of 2,000 answers")

    # It filters, together with the search.
    choice = Select(browser.find_element(By.ID, "filter"))
    choice.select_by_visible_text("Only wrong (no exact match)")
    wrong = [row for row in range(2000) if samples[row]["exact_match"] == 0]
    assert 0 < len(wrong) < 2000
    assert numbers() == wrong[:100]
    assert count() == f"{len(wrong):,} of 2,000 answers"
    search_for("question 19")
    both = [row for row in wrong if str(row).startswith("19")]
    wait_for(5, lambda: numbers() == both[:100])
    search_for("")
    choice.select_by_visible_text("Only right (exact match)")
    right = sorted(set(range(2000)) - set(wrong))
    wait_for(5, lambda: numbers() == right[:100])
    choice.select_by_visible_text("Only those cut off (no EOS)")
    assert numbers() == list(range(4, 500, 5))
    choice.select_by_visible_text("All answers")

    # No text has become code, and the console is silent.
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert.text
    assert browser.execute_script("return window.injected") is None
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 1
    assert browser.get_log("browser") == []
    screenshot = tmp_path / "report.png"
    assert browser.save_screenshot(str(screenshot))
    assert screenshot.stat().st_size > 20_000

    # Were a text not escaped, the policy would still stop it.
    browser.execute_script(
        "document.body.insertAdjacentHTML('beforeend', "
        '\'<img src=x onerror="window.injected = 1"><p onclick="window.injected = 1" id=p>p\')'
    )
    browser.execute_script("document.getElementById('p').click()")
    time.sleep(0.3)
    assert browser.execute_script("return window.injected") is None
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert any("Content Security Policy" in message for message in refused)
