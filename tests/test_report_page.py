"""The report page: what it holds, that it is safe to open, and how it answers a reader, in a headless browser."""

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from report_runs import (
    FACTS,
    HOSTILE,
    bare_run,
    group_records,
    metric_line,
    record,
    said_turn,
    write_lines,
    write_run,
    write_runs,
)
from turnwise.errors import InputError, RunError
from turnwise.report import curves, load_run, paper_table, rollouts, write_report
from turnwise.report.page import SCRIPTS, page, resource
from turnwise.report.rollouts import page_data, shown_rollouts
from turnwise.report.text import visible
from turnwise.report.tokens import token_pieces
from turnwise.report.why import return_from
from turnwise.types import Action, Rollout, Task, ToolResult

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
POLICY = Path(rollouts.__file__).parent.parent / "data" / "policy"
TASK = Task(id="t", question="q", answers=("a",))


def hostile_run(path: Path) -> Path:
    """A run in which every text that somebody else can write is hostile."""
    turns = (
        said_turn(HOSTILE, results=(ToolResult(text=HOSTILE, error=HOSTILE),)),
        said_turn(HOSTILE, action=Action(answer=HOSTILE)),
    )
    rollout = Rollout(
        task_id=HOSTILE, group=0, prompt_ids=(), turns=turns, stop="answer", error=HOSTILE,
        turn_rewards=({HOSTILE: 0.2, "__proto__": 1.0}, {}), outcome_rewards={HOSTILE: 1.0},
    )  # fmt: skip
    task = Task(id=HOSTILE, question=HOSTILE, answers=(HOSTILE, "red"), kind=HOSTILE)
    bare_run(path, [metric_line(0, exact_match=0.5), metric_line(1, "train", kl=0.1)], estimator=HOSTILE)
    lines = [record(task, 1, rollout, [0.83, -0.4], {HOSTILE: [0.1]}) for _ in range(2)]
    write_lines(path / "rollouts.jsonl", lines)
    return path


def one_rollout_run(path: Path, *rollouts: Rollout, advantages: Any = None, **columns: Any) -> Path:
    """A run of one group."""
    bare_run(path, [metric_line(0)])
    lines = [
        {**record(TASK, 1, rollout, advantages[i] if advantages else [0.5] * len(rollout.turns)), **columns}
        for i, rollout in enumerate(rollouts)
    ]
    write_lines(path / "rollouts.jsonl", lines)
    return path


def large_run(path: Path, groups: int, *, estimator: str = "mt-grpo", seed: int = 0) -> Path:
    """A run of so many groups of twelve, four at a step, whose texts differ."""
    bare_run(path, [metric_line(1, "train", kl=0.1)], estimator=estimator, seed=seed)
    rng, lines = np.random.default_rng(seed), []
    for n in range(groups):
        step, fact = 1 + n // 4, FACTS[n % len(FACTS)]
        for line in group_records("mt-grpo", step, 1 + groups // 4, n % 4, fact, rng):
            line["task"]["question"] += f" (number {n})"
            line["rollout"]["turns"][0]["text"] += f"\n{rng.integers(10**9)}"
            lines.append(line)
    write_lines(path / "rollouts.jsonl", lines)
    return path


# --- what the page holds --------------------------------------------------------------------------------


def test_the_page_asks_nothing_of_the_network(tmp_path):
    text = page([load_run(p) for p in write_runs(tmp_path, seeds=1)])
    assert not re.search(r"https?:|url\(|@import|//[a-z]|fetch|XMLHttp|import\(", text)
    assert all(v == "data:," for v in re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'>\s]*)", text))


def test_the_policy_allows_this_script_and_no_other(tmp_path):
    text = page([load_run(write_run(tmp_path / "r", estimator="mt-grpo", seed=0))])
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].split("; ")[0] == "default-src 'none'"
    assert f"script-src 'sha256-{digest}'" in policy[1].split("; ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_makes_elements_of_text_alone(name: str):
    code = re.sub(r"//.*", "", resource(name))
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|Function\(|DOMParser|srcdoc", code
    )


class Tags(HTMLParser):
    """What a parser sees: how often each tag is opened, and attributes that could run."""

    def __init__(self, text: str):
        super().__init__()
        self.seen: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_hostile_rollouts_add_no_element_to_the_page(tmp_path):
    text = page([load_run(hostile_run(tmp_path / "r"))])
    tags = Tags(text)
    assert (tags.seen.count("script"), tags.seen.count("img"), tags.handlers) == (2, 0, [])
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e\ud800]", text)


def data_of(*paths: Path) -> dict[str, Any]:
    return page_data(shown_rollouts([load_run(path) for path in paths]))


def test_every_text_stands_in_the_page_once(tmp_path):
    turn = said_turn("hi", results=(ToolResult(text="hi"), ToolResult(text="long " * 2000)))
    rollout = Rollout(task_id="t", group=0, prompt_ids=(), turns=(turn,) * 3, stop="no_action")
    data = data_of(one_rollout_run(tmp_path / "r", rollout, rollout))
    texts = data["texts"]
    assert len(texts) == len(set(texts))
    (cut,) = [text for text in texts if text.startswith("long")]
    # 10,000 characters, of which 4,000 stay, the last of them a space
    assert cut.endswith("long … (6,000 more characters)")
    found = data["rollouts"][1]["turns"][2]
    assert [texts[found["text"]], *(texts[result["text"]] for result in found["results"])] == ["hi", "hi", cut]


def test_texts_are_cut_shorter_where_they_would_be_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "MAX_TEXT_CHARS", 30_000)
    made = [
        Rollout(task_id="t", group=0, prompt_ids=(), turns=(said_turn(f"{n:x<4000}"),), stop="no_action")
        for n in range(20)
    ]
    data = data_of(one_rollout_run(tmp_path / "r", *made))
    # 20 texts: 20 · 2000 are above 30,000, 20 · 1000 are not
    assert sum("(3,000 more characters)" in text for text in data["texts"]) == 20


def test_two_thousand_rollouts_are_shared_by_the_runs(tmp_path):
    small = write_run(tmp_path / "small", estimator="grpo-or", seed=0)
    large = [large_run(tmp_path / f"{seed}", 110, seed=seed) for seed in range(2)]
    shown = shown_rollouts([load_run(run) for run in (small, *large)])
    # the small one has 108; (2000 − 108) / 2 = 946 are 78 groups of 12
    assert [len(lines) for _, lines in shown] == [108, 936, 948]
    steps = [sorted({line.step for line in lines}) for _, lines in shown]
    assert steps[1] == steps[2] == list(range(1, 29))


def test_more_runs_than_groups_show_the_first_seeds_of_every_method(tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "MAX_ROLLOUTS", 40)
    paths = write_runs(tmp_path, seeds=3)
    shown = shown_rollouts([load_run(path, rollouts=1) for path in paths])
    assert {run.name: len(lines) for run, lines in shown if lines} == {
        f"{m}-0": 12 for m in ("grpo-or", "grpo-mr", "mt-grpo")
    }


def test_a_page_of_two_thousand_rollouts_is_small(tmp_path):
    text = page([load_run(large_run(tmp_path / "r", 170))])
    assert "The page holds 1,992 rollouts of 2,040" in text
    assert len(text) < 4_000_000


def test_credit_against_the_outcome_and_against_a_turns_own_reward_is_found(tmp_path):
    # own rewards 1, 0: better ½, −½; outcomes 0, 1: worse ½, better ½
    first, second = (
        Rollout(
            task_id="t", group=0, prompt_ids=(), stop="answer", turns=(said_turn("call"), said_turn("answer")),
            turn_rewards=({"tool": own}, {}), outcome_rewards={"exact_match": outcome},
        )
        for own, outcome in ((1.0, 0.0), (0.0, 1.0))
    )  # fmt: skip
    path = one_rollout_run(tmp_path / "r", first, second, advantages=[[-0.2, 0.7], [0.2, 0.7]])
    lines = load_run(path).rollouts
    assert rollouts.against_own_reward(lines) == [[0], [0]]
    assert rollouts.against_outcome(lines) == [[1], []]


def test_an_outcome_is_what_became_of_the_rollout(tmp_path):
    plain = Rollout(task_id="t", group=0, prompt_ids=(), turns=(said_turn("hi"),), stop="no_action")
    said = dataclasses.replace(plain, turns=(said_turn("a", action=Action(answer="a")),))
    made = {
        "right": dataclasses.replace(said, outcome_rewards={"exact_match": 1.0}),
        "wrong": dataclasses.replace(said, outcome_rewards={"correct": 0.0}),
        "not checked": said,
        "no answer": dataclasses.replace(plain, outcome_rewards={"exact_match": 0.0}),
        "failed": dataclasses.replace(plain, stop="error", error="SearchUnavailable: refused"),
    }
    lines = load_run(one_rollout_run(tmp_path / "r", *made.values())).rollouts
    assert [rollouts.outcome_of(line) for line in lines] == list(made)
    assert rollouts.errors_of(lines[4]) == ["SearchUnavailable"]
    solved = dataclasses.replace(lines[0], rollout=dataclasses.replace(plain, success=True))
    assert rollouts.outcome_of(solved) == "right"


def with_tokenizer(path: Path) -> Path:
    (path / "best").mkdir()
    shutil.copy(POLICY / "tokenizer.json", path / "best")
    return path


def encoded(text: str) -> tuple[int, ...]:
    tokenizers = pytest.importorskip("tokenizers")
    return tuple(tokenizers.Tokenizer.from_file(str(POLICY / "tokenizer.json")).encode(text).ids)


def test_tokens_make_up_the_text_in_javascripts_lengths(tmp_path):
    text = "Where? Zürich 🐘\u202e, of course.\r\n"
    ids = (*encoded(text), 2)  # and the special token that ends a turn
    rollout = Rollout(task_id="t", group=0, prompt_ids=(), turns=(said_turn(text, action_ids=ids),), stop="no_action")
    path = with_tokenizer(one_rollout_run(tmp_path / "r", rollout))
    pieces = token_pieces(path)
    assert pieces is not None
    cut = pieces(ids, text)
    assert cut is not None
    assert ("".join(cut), len(cut), cut[-1]) == (text, len(ids), "")
    data = data_of(path)
    turn = data["rollouts"][0]["turns"][0]
    shown = data["texts"][turn["text"]]
    assert shown == "".join(visible(piece) for piece in cut)
    assert "⟨U+202E⟩" in shown
    assert sum(data["cuts"][turn["cuts"]]) == len(shown) + 1  # the elephant counts twice


def test_tokens_of_another_tokenizer_or_a_damaged_one_are_not_claimed(tmp_path):
    rollout = Rollout(task_id="t", group=0, prompt_ids=(), turns=(said_turn("hi"),), stop="no_action")
    path = with_tokenizer(one_rollout_run(tmp_path / "r", rollout))
    assert "cuts" not in data_of(path)["rollouts"][0]["turns"][0]
    (path / "best" / "tokenizer.json").write_text("{oops")
    assert token_pieces(path) is None
    assert "cuts" not in data_of(path)["rollouts"][0]["turns"][0]


def test_a_run_without_rollouts_or_validation_still_makes_a_page(tmp_path):
    text = page([load_run(bare_run(tmp_path / "r", [metric_line(1, "train", kl=0.1)]))])
    assert "These runs recorded no rollouts." in text
    assert "neither validation nor evaluation" in text


def test_advantages_that_are_not_finite_are_shown_as_none(tmp_path):
    rollout = Rollout(task_id="t", group=0, prompt_ids=(), turns=(said_turn("hi"), said_turn("ho")), stop="no_action")
    data = data_of(one_rollout_run(tmp_path / "r", rollout, advantages=[[float("nan"), 0.5]]))
    assert ["advantage" in turn for turn in data["rollouts"][0]["turns"]] == [False, True]


def test_an_unwritable_report_is_an_error_and_leaves_nothing(tmp_path):
    run = load_run(bare_run(tmp_path / "r", [metric_line(0)]))
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunError, match="must be writable"):
        write_report([run], tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(InputError, match="at least one run"):
        write_report([], tmp_path / "x.html")


def test_the_report_needs_no_model(tmp_path):
    run = with_tokenizer(write_run(tmp_path / "r", estimator="mt-grpo", seed=0))
    code = (
        "import sys; from turnwise.report import load_run, write_report; "
        f"write_report([load_run({str(run)!r})], {str(tmp_path / 'r.html')!r}); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# --- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclasses.dataclass
class Opener:
    """Opens pages; `wrong` collects requests, errors and console messages."""

    open: Callable[..., Any]
    wrong: list[str]

    def __call__(self, *runs: Path, **options: Any) -> Any:
        return self.open(*runs, **options)


@pytest.fixture
def open_page(chromium, tmp_path) -> Iterator[Opener]:
    """Opens the report of some runs; any request, script error or console message fails the test."""
    wrong: list[str] = []
    tabs = []

    def opened(*runs: Path, change: Callable[[str], str] = str, **options: Any) -> Any:
        out = write_report([load_run(run) for run in runs], tmp_path / "report.html")
        out.write_text(change(out.read_text(encoding="utf-8")), encoding="utf-8")
        tab = chromium.new_page(**options)
        tabs.append(tab)
        tab.on("request", lambda r: None if r.url in (out.as_uri(), "data:,") else wrong.append(r.url))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("console", lambda said: wrong.append(said.text))
        tab.goto(out.as_uri())
        return tab

    yield Opener(opened, wrong)
    for tab in tabs:
        tab.close()
    assert wrong == []


def a_run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "r", estimator="mt-grpo", seed=0)


def lines_of(path: Path) -> list[Any]:
    return list(load_run(path).rollouts)


def value(text: str) -> float:
    return float(text.replace("−", "-"))


def found(tab: Any) -> int:
    return int(tab.locator("#found").text_content().split(" of ")[0].replace(",", ""))


def credits(tab: Any) -> list[list[float]]:
    """The advantages in each row of the page in view."""
    return [[value(x) for x in row.locator(".chip").all_text_contents()] for row in tab.locator(".row").all()]


def test_a_step_is_read_in_all_charts_by_pointer_and_keys(open_page, tmp_path):
    paths = write_runs(tmp_path / "runs", seeds=2)
    runs = [load_run(path) for path in paths]
    tab = open_page(*paths)
    plot = tab.locator("svg.plot").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    tab.mouse.move(box["x"] + box["width"] * (38 + 298 * 0.5) / 340, box["y"] + box["height"] / 2)
    at = tab.locator(".readout .at").first
    assert at.text_content() == "at step 30"
    mean = dict(curves.charts(runs)[0].series[2].mean)[30]
    shown = tab.locator(".readout").first.locator("tbody tr").nth(2).locator("td").first
    assert shown.text_content() == curves.value_text(mean, True)
    tab.mouse.move(0, 0)
    assert at.text_content() == "at the end"
    plot.focus()
    tab.keyboard.press("ArrowLeft")
    assert at.text_content() == "at step 29"
    for row in paper_table(runs):
        cell = row.cells["exact_match"]
        assert cell is not None
        assert tab.get_by_text(f"{100 * cell.mean:.1f}", exact=True).count()


def test_arms_are_toggled_in_every_chart(open_page, tmp_path):
    tab = open_page(*write_runs(tmp_path / "runs", seeds=2))
    drawn = tab.locator('.chart g[data-arm="1"]')
    assert drawn.count() == tab.locator("svg.plot").count()
    assert tab.locator('.chart g[data-arm="1"] .band').first.is_visible()
    tab.get_by_role("checkbox", name="GRPO-MR").focus()
    tab.keyboard.press("Space")
    assert tab.locator('.chart [data-arm="1"]:visible').count() == 0
    assert tab.locator('.chart g[data-arm="2"]').first.is_visible()
    tab.keyboard.press("Space")
    assert tab.locator('.chart g[data-arm="1"]').first.is_visible()


def test_filters_are_over_all_groups_and_steps(open_page, tmp_path):
    path = a_run(tmp_path)
    lines = lines_of(path)
    tab = open_page(path)
    assert found(tab) == len(lines) == 108
    for outcome in ("right", "wrong"):
        tab.get_by_label("Outcome").select_option(outcome)
        assert found(tab) == sum(rollouts.outcome_of(line) == outcome for line in lines) > 0
        assert set(tab.locator(".row .ended b").all_text_contents()) == {
            {"right": "✓ right", "wrong": "✗ wrong"}[outcome]
        }
    tab.get_by_label("Outcome").select_option("")
    for error, has in (("parse", True), ("none", False)):
        tab.get_by_label("Error").select_option(label=error)
        assert found(tab) == sum((rollouts.errors_of(line) == ["parse"]) == has for line in lines) > 0
    tab.get_by_label("Error").select_option("")
    groups = [[line for line in lines if line.group == key] for key in dict.fromkeys(line.group for line in lines)]
    for name, flips in (("outcome", rollouts.against_outcome), ("own", rollouts.against_own_reward)):
        tab.get_by_label("Sign").select_option(name)
        assert found(tab) == sum(bool(turns) for group in groups for turns in flips(group)) > 0
    tab.get_by_label("Sign").select_option("")
    tab.get_by_label("Question or answer contains").fill("TUNGSTEN")
    assert found(tab) == sum("tungsten" in line.task.question for line in lines) == 36
    tab.get_by_label("Outcome").select_option("right")
    right = [x for x in lines if "tungsten" in x.task.question and rollouts.outcome_of(x) == "right"]
    assert found(tab) == len(right) < 36


def test_methods_and_runs_are_filtered(open_page, tmp_path):
    tab = open_page(*write_runs(tmp_path / "runs", seeds=2))
    assert found(tab) == 6 * 108
    picker = tab.get_by_label("Method or run")
    picker.select_option(label="GRPO-MR")
    assert found(tab) == 2 * 108
    picker.select_option(label="GRPO-MR, seed 1 · grpo-mr-1")
    assert found(tab) == 108
    assert all("GRPO-MR, seed 1" in text for text in tab.locator(".row .place").all_text_contents())


def test_arms_say_how_they_differ_and_placebos_that_rewards_are_dealt(open_page, tmp_path):
    plain, dealt = (write_run(tmp_path / name, estimator="mt-grpo", seed=0) for name in ("plain", "dealt"))
    config = json.loads((dealt / "config.json").read_text())
    config["config"] |= {"placebo": "rollouts"}
    (dealt / "config.json").write_text(json.dumps(config))
    (dealt / "record.json").write_text(json.dumps({"arm": "other-rollouts"}))
    tab = open_page(plain, dealt)
    described = tab.locator("dl.methods div").all_text_contents()
    assert len(described) == 2
    assert "MT-GRPO" in described[0]
    assert "dealt" not in described[0]
    assert described[1].startswith("other-rolloutsis MT-GRPO, which credits every turn")
    assert "With placebo rollouts. Its turn rewards are dealt out anew" in described[1]
    for label, heads in (("MT-GRPO", {"reward"}), ("other-rollouts", {"dealt"})):
        tab.get_by_label("Method or run").select_option(label=label)
        tab.locator(".row").first.click()
        names = tab.locator(".facts dt").all_text_contents()
        assert {name.split(":")[0] for name in names if name.startswith(("reward:", "dealt:"))} == heads
        assert ("by the placebo" in tab.locator("main").inner_text()) == (heads == {"dealt"})


def test_rollouts_are_sorted_by_credit_and_return(open_page, tmp_path):
    path = a_run(tmp_path)
    tab = open_page(path)
    keys = {"credit": lambda a: max(map(abs, a)), "up": max, "down": lambda a: -min(a)}
    for order, key in keys.items():
        tab.get_by_label("Order").select_option(order)
        numbers = [key(row) for row in credits(tab)]
        assert len(numbers) == 40
        assert numbers == sorted(numbers, reverse=True)
        assert numbers[0] == pytest.approx(max(key(line.advantages) for line in lines_of(path)), abs=0.006)
    returns = [return_from(line) for line in lines_of(path)]
    for order, expected in (("high", max(returns)), ("low", min(returns))):
        tab.get_by_label("Order").select_option(order)
        tab.locator(".row").first.click()
        assert tab.locator(".rollout footer").text_content().startswith(f"Return {expected:.2f}:")
    tab.get_by_label("Order").select_option("step")
    assert tab.locator(".row .place").first.text_content().startswith("step 1 ·")


def test_the_step_slider_moves_by_arrow_keys(open_page, tmp_path):
    tab = open_page(a_run(tmp_path))
    slider = tab.get_by_role("slider")
    slider.focus()
    for key, step in (("ArrowRight", "1"), ("ArrowRight", "30"), ("End", "60"), ("ArrowLeft", "30")):
        tab.keyboard.press(key)
        assert found(tab) == 36
        assert {x.split(" ·")[0] for x in tab.locator(".row .place").all_text_contents()} == {f"step {step}"}
        assert slider.get_attribute("aria-valuetext") == f"step {step}"
    tab.keyboard.press("Home")
    assert (found(tab), slider.get_attribute("aria-valuetext")) == (108, "all steps")


def test_an_opened_rollout_has_its_turns_numbers_and_reasons(open_page, tmp_path):
    turns = (
        said_turn("look", results=(ToolResult(text="Paris and a Parisian", error=None),)),
        said_turn("a", action=Action(answer="a", error="masked")),
    )
    one = Rollout(
        task_id="t", group=0, prompt_ids=(), turns=turns, stop="max_tokens",
        turn_rewards=({"tool_execution": 0.2}, {}), outcome_rewards={"exact_match": 1.0},
    )  # fmt: skip
    other = dataclasses.replace(one, turn_rewards=({}, {}), outcome_rewards={"exact_match": 0.0})
    path = one_rollout_run(
        tmp_path / "r", one, other, advantages=[[1.4142, 0.7071], [-1.4142, -0.7071]],
        baselines={"value": [0.3, 0.4]}, task={"id": "t", "question": "q", "answers": ["Paris"], "kind": ""},
    )  # fmt: skip
    tab = open_page(path)
    tab.get_by_label("Order").select_option("up")
    tab.locator(".row").first.click()
    first, second = tab.locator(".rollout .turn").all()
    assert first.locator(".adv").text_content() == "+1.41"
    facts = dict(zip(first.locator("dt").all_text_contents(), first.locator("dd").all_text_contents(), strict=True))
    assert facts == {
        "reward: tool execution": "0.20", "return from here on": "1.20", "critic’s value before": "0.30",
        "advantage": "+1.41", "in the loss": "yes", "tokens sampled": "2", "tool": "ran",
    }  # fmt: skip
    why = first.locator(".why").text_content()
    assert "the mean of it and 1 sibling at turn 1" in why
    assert "Paid here: tool execution 0.20." in why
    facts = dict(zip(second.locator("dt").all_text_contents(), second.locator("dd").all_text_contents(), strict=True))
    assert (facts["outcome: exact match"], facts["in the loss"]) == ("1.00", "no (masked out)")
    assert "not in the loss · cut off" in second.locator(".head").text_content()
    assert first.locator(".env u").all_text_contents() == ["Paris"]  # as a whole word alone


def test_one_rollout_is_open_and_keys_move_open_and_close(open_page, tmp_path):
    tab = open_page(a_run(tmp_path))
    rows = tab.locator(".row")
    rows.first.focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    assert rows.nth(1).get_attribute("aria-expanded") == "true"
    assert tab.locator(".rollout").count() == 1
    rows.nth(3).click()
    assert tab.locator(".rollout").count() == 1
    assert rows.nth(1).get_attribute("aria-expanded") == "false"
    tab.locator(".rollout .actions button").first.focus()
    tab.keyboard.press("Escape")
    assert tab.locator(".rollout").count() == 0
    assert tab.evaluate("document.activeElement.dataset.rollout") == rows.nth(3).get_attribute("data-rollout")
    tab.keyboard.press("ArrowUp")
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.get_by_role("button", name="Next", exact=True).click()
    assert tab.locator("#page-now").text_content() == "41 to 80 of 108"
    assert tab.evaluate("document.activeElement.className") == "row"


def token_run(tmp_path: Path) -> tuple[Path, list[float]]:
    """A run whose tokens have credit of their own, and that credit."""
    text, answer = "<answer>\nParis\n</answer>", "Lyon"
    turns = tuple(
        said_turn(t, action_ids=(*encoded(t), 2), results=(ToolResult(text="Paris"),)) for t in (text, answer)
    )
    rollout = Rollout(task_id="t", group=0, prompt_ids=(), turns=turns, stop="no_action")
    total = sum(len(turn.action_ids) for turn in turns)
    own = [round(float(a), 3) for a in np.linspace(-1, 1, total)]
    counts = [len(turn.action_ids) for turn in turns]
    means = [float(np.mean(own[: counts[0]])), float(np.mean(own[counts[0] :]))]
    path = one_rollout_run(
        tmp_path / "r", rollout, advantages=[means], token_advantages=own, token_values=[0.25] * total
    )
    return with_tokenizer(path), own


def test_tokens_are_shaded_by_their_advantage(open_page, tmp_path):
    path, own = token_run(tmp_path)
    tab = open_page(path)
    tab.locator(".row").click()
    tokens = tab.locator(".token")
    assert tokens.count() == len(own)
    first = tab.locator(".said").first
    assert first.inner_text().rstrip("▪") == "<answer>\nParis\n</answer>"
    scale = rollouts.colour_scale(lines_of(path))
    for token, credit in zip(tokens.all(), own, strict=True):
        classes = token.get_attribute("class").split()
        assert ("pos" in classes, "neg" in classes) == (credit >= 0.005, credit <= -0.005)
        weight = float(token.evaluate("e => e.style.getPropertyValue('--w')"))
        assert weight == pytest.approx(min(1, abs(credit) / scale) ** 0.5, abs=0.006)
    colours = {token.evaluate("e => getComputedStyle(e).backgroundColor") for token in tokens.all()}
    assert len(colours) > 5
    assert tab.locator(".env .token, .env .pos, .env .neg").count() == 0
    styles = {token.evaluate("e => getComputedStyle(e).borderBottomStyle") for token in tokens.all()}
    assert styles == {"solid", "dashed"}  # signs differ in more than colour


def test_a_tokens_number_is_read_by_pointer_and_by_keys(open_page, tmp_path):
    path, own = token_run(tmp_path)
    tab = open_page(path)
    tab.locator(".row").click()
    reading = tab.locator(".turn").first.locator("output.reading")
    tab.locator(".token").nth(1).hover()
    assert f"Token 2 of {tab.locator('.said').first.locator('.token').count()}" in reading.text_content()
    assert f"advantage {own[1]:.2f}".replace("-", "−") in reading.text_content()
    tab.locator(".said").first.focus()
    tab.keyboard.press("Home")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert f"advantage {own[2]:.2f}; value 0.25".replace("-", "−") in reading.text_content()
    tab.keyboard.press("End")
    assert "that adds no text" in reading.text_content()
    tab.locator(".said").nth(1).focus()
    assert "point at one" in reading.text_content()


def test_turns_without_known_tokens_are_shaded_as_a_whole(open_page, tmp_path):
    tab = open_page(a_run(tmp_path))
    tab.locator(".row").first.click()
    turn = tab.locator(".turn").first
    assert turn.locator(".token").count() == 1
    assert turn.locator(".token").text_content() == turn.locator(".said").text_content()
    assert "no tokenizer" in turn.locator(".reading").text_content()


def test_a_group_lines_its_siblings_up(open_page, tmp_path):
    path = a_run(tmp_path)
    lines = lines_of(path)
    tab = open_page(path)
    tab.get_by_label("Outcome").select_option("wrong")
    tab.get_by_label("Order").select_option("down")
    row = tab.locator(".row").first
    place = int(row.get_attribute("data-rollout"))
    group = [line for line in lines if line.group == lines[place].group]
    row.click()
    tab.get_by_role("button", name="Its group (12)").click()
    table = tab.locator("table.siblings")
    assert table.locator("tbody tr").count() == len(group) == 12
    for shown, line in zip(table.locator("tbody tr").all(), group, strict=True):
        cells = [value(text) for text in shown.locator(".cell b").all_text_contents()]
        assert cells == pytest.approx(line.advantages, abs=0.006)
        assert value(shown.locator(".sum").text_content()) == pytest.approx(return_from(line), abs=0.006)
    focused = "document.activeElement.dataset.rollout"
    assert int(tab.evaluate(focused)) == place  # the sibling that it was opened from
    assert tab.locator("#list").is_hidden()


def test_keys_move_in_a_group_and_open_and_close(open_page, tmp_path):
    tab = open_page(a_run(tmp_path))
    tab.get_by_role("button", name="Groups side by side").click()
    where = "[document.activeElement.dataset.rollout, document.activeElement.dataset.turn].join()"
    assert tab.locator('.cell[tabindex="0"]').count() == 1
    tab.locator('.cell[tabindex="0"]').focus()
    first = tab.evaluate(where)
    tab.keyboard.press("ArrowRight")
    second = tab.evaluate(where)
    assert (first[-2:], second[-2:]) == (",0", ",1")
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate(where).endswith(",1")
    below = tab.evaluate(where)
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.getAttribute('aria-label')").startswith("turn 2, advantage")
    assert tab.locator(".opened .rollout").count() == 1
    tab.keyboard.press("Escape")
    assert tab.locator(".opened .rollout").count() == 0
    assert tab.evaluate(where) == below
    tab.keyboard.press("Escape")
    assert tab.locator("#list").is_visible()
    assert tab.locator(".siblings").count() == 0


def test_groups_are_those_of_the_filters(open_page, tmp_path):
    tab = open_page(a_run(tmp_path))
    tab.get_by_role("button", name="Groups side by side").click()
    assert "group 1 of 9" in tab.locator("#group").text_content()
    tab.get_by_role("button", name="Next group").focus()
    for group in (2, 3):  # the button keeps the focus
        tab.keyboard.press("Enter")
        assert f"group {group} of 9" in tab.locator("#group").text_content()
    tab.get_by_label("Question or answer contains").fill("tungsten")
    assert "of 3" in tab.locator("#group .pager span").text_content()
    tab.get_by_label("Question or answer contains").fill("nobody asked this")
    assert "No group has such a rollout." in tab.locator("#group").text_content()
    tab.get_by_label("Question or answer contains").fill("")
    assert tab.locator("table.siblings").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_light_and_dark(open_page, tmp_path, scheme):
    size = {"width": 390, "height": 844}
    tab = open_page(*write_runs(tmp_path / "runs", seeds=1), viewport=size, color_scheme=scheme)
    tab.locator(".row").first.click()
    assert min(name.bounding_box()["width"] for name in tab.locator(".facts dt").all()) > 100
    wide = "document.documentElement.scrollWidth"
    assert tab.evaluate(wide) <= 390
    tab.get_by_role("button", name="Its group (12)").click()
    assert tab.evaluate(wide) <= 390
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[scheme]


def test_two_thousand_rollouts_stay_fluent(open_page, tmp_path):
    runs = [large_run(tmp_path / name, 85, estimator=name, seed=seed) for seed, name in enumerate(("mt-grpo", "own"))]
    lines = [line for _, shown in shown_rollouts([load_run(run) for run in runs]) for line in shown]
    tab = open_page(*runs)
    assert found(tab) == len(lines) == 1_992
    nodes = "document.getElementById('browser').querySelectorAll('*').length"
    assert tab.evaluate(nodes) < 900  # forty rows, whatever the page holds
    tab.get_by_label("Outcome").select_option("wrong")
    assert found(tab) == sum(rollouts.outcome_of(line) == "wrong" for line in lines)
    tab.get_by_label("Order").select_option("down")
    assert tab.evaluate(nodes) < 900
    seen = 0
    while True:  # through all pages
        seen += tab.locator(".row").count()
        if tab.locator("#page-on").is_disabled():
            break
        tab.locator("#page-on").click()
    assert seen == found(tab)
    tab.locator(".row").first.click()
    assert tab.evaluate(nodes) < 1_200
    tab.get_by_role("button", name="Its group (12)").click()
    assert tab.evaluate(nodes) < 1_400


def test_hostile_rollouts_are_shown_as_text(open_page, tmp_path):
    tab = open_page(hostile_run(tmp_path / "r"))
    assert tab.title() == "Turnwise report"
    said = " ".join(visible(HOSTILE).split())
    assert said in " ".join(tab.locator(".row .question").first.inner_text().split())
    tab.locator(".row").first.click()
    text = " ".join(tab.locator(".said").first.inner_text().split())
    assert text == said
    assert "␛[31mred␛[0m ␀␇␡ ⟨U+202E⟩right-to-left" in text
    assert "⟨U+D800⟩" in text
    for place in (".env pre", ".failed", ".facts", ".why"):
        assert "</script><script>" in tab.locator(place).first.inner_text()
    assert "proto" in tab.locator(".facts").first.inner_text()
    tab.get_by_role("button", name="Its group (2)").click()
    assert tab.locator("img").count() == 0
    assert tab.title() == "Turnwise report"
    tab.get_by_label("Question or answer contains").fill("<img")
    assert found(tab) == 2


def test_the_policy_stops_a_script_that_got_into_the_page(open_page, tmp_path):
    injected = "<script>document.title='owned'</script></main>"
    tab = open_page(hostile_run(tmp_path / "r"), change=lambda text: text.replace("</main>", injected))
    assert tab.title() == "Turnwise report"
    assert any("Content Security Policy" in said for said in open_page.wrong)
    open_page.wrong.clear()


def test_without_a_script_curves_and_tables_are_there_and_a_note(open_page, tmp_path):
    tab = open_page(*write_runs(tmp_path / "runs", seeds=1), java_script_enabled=False)
    assert tab.locator("svg.plot .mean").first.is_visible()
    assert tab.locator("table.results").is_visible()
    assert tab.get_by_text("The rollouts are shown by a script").is_visible()
    assert tab.locator("#browser").is_hidden()
