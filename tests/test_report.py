"""The report reads run directories, never a model: tables, curves, a page that is safe to open."""

import base64
import dataclasses
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from report_runs import (
    FACTS,
    a_rollout,
    advantages,
    record,
    write_json,
    write_lines,
    write_run,
    write_runs,
)
from turnwise.errors import InputError, RunError
from turnwise.report import (
    curves,
    load_run,
    markdown_table,
    paper_table,
    print_table,
    table_notes,
    transcripts,
    write_report,
)
from turnwise.report.page import embedded_json, page
from turnwise.report.text import escaped, marked_up, one_line, shortened, visible
from turnwise.report.why import reasons
from turnwise.types import Action, Rollout, Task, ToolResult, Turn

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<!-- --> ]]> &lt; \x1b[31mred\x1b[0m \x00\x07\x7f \u202eright-to-left "
    "[bold]rich[/bold] \ud800 'q' \"q\""
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def bare_run(path: Path, lines: list, *, estimator: str = "mt-grpo", seed: int = 0, **config) -> Path:
    path.mkdir(parents=True)
    write_json(
        path / "config.json",
        {"format": 1, "config": {"estimator": estimator, "seed": seed, **config}},
    )
    write_lines(path / "metrics.jsonl", lines)
    return path


def line(step: int, split: str = "validation", **metrics) -> dict:
    return {"step": step, "split": split, "wall_s": 1.0, "metrics": metrics}


def a_turn(text: str, **fields) -> Turn:
    action = fields.pop("action", Action())
    return Turn(action_ids=(5, 6), sampling_logprobs=(-1.0, -1.0), text=text, action=action, **fields)


# --- reading ------------------------------------------------------------------------------------


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = load_run(write_run(tmp_path / "r", estimator="mt-grpo", seed=4))
    assert (run.name, run.estimator, run.seed, run.notes) == ("r", "mt-grpo", 4, ())
    assert [x.step for x in run.of_split("validation")] == [0, 15, 30, 45, 60]
    # three groups of twelve at each of three recorded steps
    assert len(run.rollouts) == 3 * 3 * 12
    assert run.rollouts[0].task.answers == ("Kenyan shilling", "shilling")
    assert all(len(x.advantages or ()) == len(x.rollout.turns) for x in run.rollouts)


def test_steps_evenly_spread_keep_their_rollouts(tmp_path):
    path = bare_run(tmp_path / "r", [line(1)])
    rollout = Rollout(task_id="t", group=0, prompt_ids=(), turns=(a_turn("hi"),), stop="answer")
    task = Task(id="t", question="q", answers=("a",))
    write_lines(path / "rollouts.jsonl", [record(task, step, rollout, [0.5]) for step in range(1, 35)])
    assert [x.step for x in load_run(path).rollouts] == [*range(1, 35, 3)]


def test_what_is_no_run_directory_is_named(tmp_path):
    with pytest.raises(RunError, match=r"nowhere must be a run directory.*no such directory"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"must be a run directory.*one of them is missing"):
        load_run(tmp_path)


def test_another_format_version_is_refused(tmp_path):
    path = bare_run(tmp_path / "r", [line(0)])
    write_json(path / "config.json", {"format": 2, "config": {}})
    with pytest.raises(RunError, match="must have format 1; got 2"):
        load_run(path)


def test_a_run_without_metrics_is_refused(tmp_path):
    with pytest.raises(RunError, match="must hold at least one line"):
        load_run(bare_run(tmp_path / "r", []))


def test_a_half_written_last_line_is_skipped_with_a_note(tmp_path):
    path = bare_run(tmp_path / "r", [line(0, exact_match=0.25)])
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "split": "vali\xc3')  # cut inside a character
    run = load_run(path)
    assert [x.step for x in run.lines] == [0]
    assert run.notes == ("metrics.jsonl:2: a half-written last line was skipped.",)


def test_a_damaged_line_elsewhere_is_an_error_with_its_place(tmp_path):
    path = bare_run(tmp_path / "r", [line(0)])
    good = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(good + "{oops\n" + good)
    with pytest.raises(InputError, match=r"metrics\.jsonl:2 must be one JSON object"):
        load_run(path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("[1]", "metrics.jsonl:1 must hold a JSON object; got list"),
        (
            '{"split": "train", "metrics": {}}',
            "metrics.jsonl:1: step must be of type int; got nothing",
        ),
        ('{"step": true, "split": "train", "metrics": {}}', "step must be of type int; got True"),
        (
            '{"step": 1, "split": "train", "metrics": {"f1": "x"}}',
            "metrics.f1 must be a number; got 'x'",
        ),
    ],
)
def test_a_record_of_the_wrong_shape_is_an_error(tmp_path, bad, message):
    path = bare_run(tmp_path / "r", [])
    (path / "metrics.jsonl").write_text(bad + "\n")
    with pytest.raises(InputError, match=re.escape(message)):
        load_run(path)


def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path):
    path = bare_run(tmp_path / "r", [line(0, kl=float("nan"), f1=None, exact_match=0.5)])
    run = load_run(path)
    assert run.lines[0].metrics == {"exact_match": 0.5}
    assert "1 values are not finite" in run.notes[0]


def test_a_step_that_a_resumed_run_wrote_again_counts_once(tmp_path):
    path = bare_run(tmp_path / "r", [line(0, f1=0.1), line(5, f1=0.2), line(5, f1=0.3)])
    run = load_run(path)
    assert [(x.step, x.metrics["f1"]) for x in run.lines] == [(0, 0.1), (5, 0.3)]
    assert "1 lines stand there again" in run.notes[0]


def test_one_advantage_per_turn_is_required(tmp_path):
    path = bare_run(tmp_path / "r", [line(0)])
    rollout = Rollout(task_id="t", group=0, prompt_ids=(), turns=(a_turn("hi"),), stop="answer")
    write_lines(
        path / "rollouts.jsonl",
        [record(Task(id="t", question="q", answers=("a",)), 1, rollout, [1, 2])],
    )
    with pytest.raises(InputError, match=r"rollouts\.jsonl:1: advantages must have one entry per turn, 1; got 2"):
        load_run(path)


# --- the table ----------------------------------------------------------------------------------


def test_the_table_holds_mean_and_range_over_seeds(tmp_path):
    ends = [0.2, 0.4, 0.9]
    runs = [
        load_run(bare_run(tmp_path / f"{i}", [line(0, exact_match=0.1), line(9, exact_match=e)], seed=i))
        for i, e in enumerate(ends)
    ]
    (row,) = paper_table(runs)
    end, start = row.cells["exact_match"], row.cells["exact_match_start"]
    assert end is not None
    assert start is not None
    # (0.2 + 0.4 + 0.9) / 3 = 0.5
    assert (row.title, row.seeds, row.population) == ("MT-GRPO", (0, 1, 2), "validation")
    assert (round(end.mean, 9), end.low, end.high, round(start.mean, 9)) == (0.5, 0.2, 0.9, 0.1)
    assert row.cells["tool_execution"] is None  # never a silent zero
    assert "| MT-GRPO | 3 | – | – | – | 10.0 (10.0–10.0) | 50.0 (20.0–90.0) |" in markdown_table([row])


def test_rows_stand_in_the_papers_order_and_others_follow(tmp_path):
    names = ["zeta", "mt-grpo", "alpha", "grpo-or"]
    runs = [load_run(bare_run(tmp_path / n, [line(0, f1=0.1)], estimator=n)) for n in names]
    assert [r.title for r in paper_table(runs)] == ["GRPO-OR", "MT-GRPO", "alpha", "zeta"]


def test_evaluations_make_rows_of_their_own(tmp_path):
    path = bare_run(tmp_path / "r", [line(0, exact_match=0.1), line(9, exact_match=0.2)])
    for name, value in (("test", 0.7), ("test-start", 0.3)):
        number = {"mean": value, "low": 0.0, "high": 1.0, "n": 500}
        write_json(
            path / f"eval-{name}.json",
            {"name": name, "mode": "greedy", "metrics": {"exact_match": number}},
        )
    validation, test = paper_table([load_run(path)])
    assert (validation.population, test.population) == ("validation", "test, greedy")
    assert test.cells["exact_match"].mean == 0.7
    assert test.cells["exact_match_start"].mean == 0.3


def test_notes_tell_what_the_range_does_not_show(tmp_path):
    a = load_run(bare_run(tmp_path / "a", [line(0, f1=0.1, exact_match=0.1), line(5, f1=0.1, exact_match=0.1)]))
    b = load_run(bare_run(tmp_path / "b", [line(0, f1=0.1)]))
    notes = " ".join(table_notes([a, b]))
    assert "share a seed" in notes
    assert "different steps, 0 to 5" in notes
    assert "Exact match, end comes from 1 of 2 runs" in notes


def test_the_terminal_gets_neither_markup_nor_escapes(tmp_path):
    run = load_run(bare_run(tmp_path / "r", [line(0, exact_match=0.5)], estimator=HOSTILE))
    out = io.StringIO()
    print_table(paper_table([run]), Console(file=out, width=400, force_terminal=True, color_system=None))
    text = out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert "[bold]rich[/bold]" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text)


# --- curves -------------------------------------------------------------------------------------


def test_the_mean_line_stands_where_all_seeds_have_a_value(tmp_path):
    def run(seed, values):
        lines = [line(i, "train", kl=v) for i, v in enumerate(values)]
        return load_run(bare_run(tmp_path / str(seed), lines, seed=seed))

    (chart,) = curves.charts([run(0, [1.0, 3.0, 5.0]), run(1, [3.0, 4.0])])
    (series,) = chart.series
    # (1 + 3) / 2 = 2, (3 + 4) / 2 = 3.5; the third step has one seed only
    assert series.mean == ((0, 2.0), (1, 3.5))
    assert (series.low, series.high) == (((0, 1.0), (1, 3.0)), ((0, 3.0), (1, 4.0)))
    assert [len(s) for s in series.seeds] == [3, 2]


def test_a_long_curve_is_averaged_to_a_bounded_number_of_points():
    points = tuple((i, float(i)) for i in range(1000))
    # 1000 points in 500 bins: the first holds 0 and 1, ends at step 1, mean 0.5
    out = curves.binned(points, 500)
    assert (len(out), out[0], out[-1]) == (500, (1.0, 0.5), (999.0, 998.5))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0, 60, [0, 20, 40, 60]),
        (-2, 2, [-2, -1, 0, 1, 2]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, expected):
    assert curves.ticks(low, high) == pytest.approx(expected)


def test_an_estimator_keeps_its_colour_whatever_else_is_shown(tmp_path):
    runs = [load_run(bare_run(tmp_path / n, [line(0)], estimator=n)) for n in ("mt-grpo", "own")]
    assert curves.styles(runs) == {"mt-grpo": 2, "own": 3}


# --- why ----------------------------------------------------------------------------------------


def credited(own: list[float], outcome: list[float], advantages: list[tuple[float, ...]], **config):
    """A recorded group of two-turn rollouts and what is said about them."""
    lines = []
    for i, (r, o, a) in enumerate(zip(own, outcome, advantages, strict=True)):
        rollout = Rollout(
            task_id="t", group=0, prompt_ids=(), stop="answer",
            turns=(a_turn("call"), a_turn("answer")),
            turn_rewards=({"tool_execution": r}, {}), outcome_rewards={"exact_match": o},
        )  # fmt: skip
        lines.append(json.dumps(record(Task(id="t", question="q", answers=("a",)), i, rollout, a)))
    return lines, config


def said_about(tmp_path, own, outcome, advantages, **config):
    lines, config = credited(own, outcome, advantages, **config)
    path = bare_run(tmp_path / "r", [line(0)], **config)
    records = [{**json.loads(x), "step": 1} for x in lines]
    write_lines(path / "rollouts.jsonl", records)
    run = load_run(path)
    return reasons(run.rollouts, run.config)


def test_mt_grpo_is_explained_by_the_turns_own_reward_and_the_outcome(tmp_path):
    # own rewards 0, 1: mean ½, ddof-1 std √½ = 0.71, z = ∓0.71
    # outcomes 2, 0: mean 1, std √2 = 1.41, z = ±0.71
    own, outcome = [0.0, 1.0], [2.0, 0.0]
    first, second = said_about(tmp_path, own, outcome, [(0.0, 0.7071), (0.0, -0.7071)])
    assert first[0] == (
        "0.00 = −0.71 + 0.71\n−0.71: (turn 1’s own reward 0.00 − mean 0.50) / 0.71\n"
        "+0.71: (outcome 2.00 − mean 1.00) / 1.41"
    )
    assert second[1] == "−0.71 = (outcome 0.00 − mean 1.00) / 1.41."


def test_grpo_mr_is_explained_by_the_discounted_sum(tmp_path):
    # γ = ½: 1 + ½·2 = 2 and 0 + ½·0 = 0: mean 1, std √2
    said = said_about(
        tmp_path,
        [1.0, 0.0],
        [2.0, 0.0],
        [(0.7071,) * 2, (-0.7071,) * 2],
        estimator="grpo-mr",
        gamma=0.5,
    )
    assert said[0][1] == "+0.71 = (all rewards 2.00 − mean 1.00) / 1.41. Every turn gets the same."


def test_no_equation_is_claimed_that_the_recorded_advantages_do_not_meet(tmp_path):
    said = said_about(tmp_path, [0.0, 1.0], [2.0, 0.0], [(0.9, 0.7071), (0.0, -0.7071)])
    assert said[0] == [
        "+0.90: own reward 0.00, from here on 2.00.",
        "+0.71: own reward 0.00, from here on 2.00.",
    ]


def test_a_group_without_difference_says_so(tmp_path):
    said = said_about(tmp_path, [1.0, 1.0], [2.0, 2.0], [(0.0, 0.0)] * 2, estimator="grpo-or")
    assert said[0][0] == "0.00: the whole group earned the same, nothing to compare. Every turn gets the same."


def test_the_generators_advantages_are_all_explained(tmp_path):
    for name in ("grpo-or", "grpo-mr", "mt-grpo"):
        run = load_run(write_run(tmp_path / name, estimator=name, seed=0))
        for group in transcripts.groups([run]):
            for sentences in reasons(group.lines, run.config):
                assert all("from here on" not in s for s in sentences)


# --- text ---------------------------------------------------------------------------------------


def test_control_and_direction_characters_become_visible():
    assert visible("a\x1b[31m\x00\x7f\u202e\ud800\u00a0b\n\tc") == "a␛[31m␀␡⟨U+202E⟩⟨U+D800⟩ b\n\tc"
    assert one_line(" a\n\nb ") == "a b"


def test_answers_are_underlined_as_whole_words_only():
    assert marked_up("Paris & Parisian <tool>", ["paris", "Pari"]) == "<u>Paris</u> &amp; Parisian <i>&lt;tool&gt;</i>"


def test_hostile_text_is_escaped_everywhere():
    assert not re.search(r"[<>\"']", escaped(HOSTILE))
    assert "<script" not in marked_up(HOSTILE, ["script", "img"])
    assert json.loads(embedded_json({"a": HOSTILE})) == {"a": HOSTILE}
    assert not re.search(r"[<>&\ud800\u2028]", embedded_json({"a": HOSTILE + "\u2028"}))


def test_long_text_says_how_much_is_missing():
    assert shortened("abcdef", 4) == "abcd … (2 more characters)"
    assert shortened("abcd", 4) == "abcd"


# --- the page -----------------------------------------------------------------------------------


def hostile_run(path: Path) -> Path:
    """A run in which every text that somebody else can write is hostile."""
    turns = (
        a_turn(HOSTILE, results=(ToolResult(text=HOSTILE, error=HOSTILE),)),
        a_turn(HOSTILE, action=Action(answer=HOSTILE)),
    )
    rollout = Rollout(
        task_id=HOSTILE, group=0, prompt_ids=(), turns=turns, stop="answer", error=HOSTILE,
        turn_rewards=({HOSTILE: 0.2}, {}), outcome_rewards={HOSTILE: 1.0},
    )  # fmt: skip
    task = Task(id=HOSTILE, question=HOSTILE, answers=(HOSTILE, "red"), kind=HOSTILE)
    bare_run(path, [line(0, exact_match=0.5), line(1, "train", kl=0.1)], estimator=HOSTILE)
    lines = [record(task, 1, rollout, [0.83, -0.4], {HOSTILE: [0.1]}) for _ in range(2)]
    write_lines(path / "rollouts.jsonl", lines)
    return path


def test_the_page_asks_nothing_of_the_network(tmp_path):
    text = page([load_run(p) for p in write_runs(tmp_path, seeds=1)])
    assert not re.search(r"https?:|url\(|@import|//[a-z]", text)
    assert all(v == "data:," for v in re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'>\s]*)", text))


def test_the_policy_allows_this_script_and_no_other(tmp_path):
    text = page([load_run(write_run(tmp_path / "r", estimator="mt-grpo", seed=0))])
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].split("; ")[0] == "default-src 'none'"
    assert f"script-src 'sha256-{digest}'" in policy[1].split("; ")


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
    assert "␛[31mred␛[0m" in text


def test_a_turn_carries_its_advantage_as_number_colour_and_reason(tmp_path):
    run = load_run(write_run(tmp_path / "r", estimator="mt-grpo", seed=0))
    text, scale = page([run]), transcripts.colour_scale(transcripts.groups([run]))
    turns = re.findall(r'class="turn (pos|neg|none)"[^>]*--w:([\d.]+)".*?class="adv">([^<]*)<', text, re.DOTALL)
    assert {kind for kind, _, _ in turns} >= {"pos", "neg"}
    for kind, width, badge in turns:
        assert badge[0] == {"pos": "+", "neg": "−", "none": "0"}[kind]
        assert float(width) == pytest.approx(min(1, abs(float(badge.replace("−", "-"))) / scale), abs=0.01)


def test_rollouts_that_say_and_earn_the_same_share_a_card(tmp_path):
    path = bare_run(tmp_path / "r", [line(0)])
    rollout = Rollout(task_id="t", group=0, prompt_ids=(), turns=(a_turn("hi"),), stop="no_action")
    other = dataclasses.replace(rollout, turns=(a_turn("ho"),))
    task = Task(id="t", question="q", answers=("a",))
    write_lines(path / "rollouts.jsonl", [record(task, 1, r, [0.0]) for r in (rollout, other, rollout)])
    text = page([load_run(path)])
    assert text.count('<article class="card"') == 2
    assert text.count("× 2 alike") == 1


def test_the_page_is_bounded_and_shows_every_estimator(tmp_path):
    runs = [load_run(p) for p in write_runs(tmp_path, seeds=5)]
    shown = transcripts.groups(runs)
    assert sum(len(g.lines) for g in shown) <= transcripts.MAX_ROLLOUTS
    assert {(g.run.estimator, g.step) for g in shown} == {
        (e, s) for e in ("grpo-or", "grpo-mr", "mt-grpo") for s in (1, 30, 60)
    }
    assert len(page(runs)) < 3_000_000


def test_a_run_without_rollouts_or_validation_still_makes_a_page(tmp_path):
    text = page([load_run(bare_run(tmp_path / "r", [line(1, "train", kl=0.1)]))])
    assert "These runs recorded no rollouts." in text
    assert "neither validation nor evaluation" in text


def test_an_unwritable_report_is_an_error_and_leaves_nothing(tmp_path):
    run = load_run(bare_run(tmp_path / "r", [line(0)]))
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunError, match="must be writable"):
        write_report([run], tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(InputError, match="at least one run"):
        write_report([], tmp_path / "x.html")


def test_the_report_needs_no_model():
    code = "import sys, turnwise.report; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# --- in a browser -------------------------------------------------------------------------------


def browse(file: Path, folder: Path) -> tuple[str, str]:
    """(document after the scripts ran, console messages) of a local page."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
               "--disable-background-networking",
               "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}",
               "--virtual-time-budget=3000", "--dump-dom", file.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=300, check=True)
    log = done.stderr.decode(errors="replace")
    return done.stdout.decode(), "\n".join(x for x in log.splitlines() if "CONSOLE" in x)


def driven(text: str, script: str) -> str:
    """The page with one more script, allowed by its policy: a test's hand on the mouse."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    return text.replace("</body>", f"<script>{script}</script></body>")


@needs_browser
def test_the_page_renders_and_answers_the_reader(tmp_path):
    runs = [load_run(p) for p in write_runs(tmp_path / "runs", seeds=2)]
    out = write_report(runs, tmp_path / "report.html")
    script = """
      const found = {};
      found.shown = [...document.querySelectorAll("details.group")].filter((g) => !g.hidden).length;
      found.colours = [...new Set([...document.querySelectorAll(".turn")].map(
        (t) => getComputedStyle(t).backgroundColor))].length;
      const plot = document.querySelector("svg.plot");
      const box = plot.getBoundingClientRect();
      const x = box.left + box.width * (38 + 298 * 0.5) / 340;
      plot.dispatchEvent(new PointerEvent("pointermove", { clientX: x, bubbles: true }));
      found.at = document.querySelector(".readout .at").textContent;
      const third = document.querySelectorAll(".readout tbody tr")[2];
      found.mean = third.querySelector("td").textContent;
      plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
      found.left = document.querySelector(".readout .at").textContent;
      plot.dispatchEvent(new PointerEvent("pointerleave"));
      found.rest = document.querySelector(".readout .at").textContent;
      const run = document.getElementById("pick-run");
      run.value = run.options[0].value;
      run.dispatchEvent(new Event("input", { bubbles: true }));
      found.picked = [...document.querySelectorAll("details.group")].filter((g) => !g.hidden)
        .map((g) => g.dataset.run);
      const turn = document.querySelector("details:not([hidden]) .turn");
      found.tip = [getComputedStyle(turn.querySelector(".tip")).display];
      turn.focus();
      found.tip.push(getComputedStyle(turn.querySelector(".tip")).display);
      document.body.dataset.found = JSON.stringify(found);
    """
    out.write_text(driven(out.read_text(), script))
    dom, console = browse(out, tmp_path)
    assert console == ""
    data = re.search(r'data-found="([^"]*)"', dom)
    assert data is not None
    found = json.loads(data[1].replace("&quot;", '"'))
    mean = curves.charts(runs)[0].series[2].mean
    assert found["mean"] == curves.value_text(dict(mean)[30], True)
    assert (found["at"], found["left"], found["rest"]) == ("at step 30", "at step 29", "at the end")
    assert found["shown"] == 1
    assert found["picked"] == ["GRPO-OR, seed 0 · grpo-or-0"]
    assert found["tip"] == ["none", "grid"]
    assert found["colours"] > 5
    for row in paper_table(runs):
        assert f">{100 * row.cells['exact_match'].mean:.1f}</span>" in dom


@pytest.fixture
def open_page(tmp_path):
    """Opens the report of some runs in Chromium, driven by Playwright; any request or script error fails the test."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        wrong: list[str] = []

        def opened(runs, **options):
            out = write_report([load_run(r) for r in runs], tmp_path / "report.html")
            tab = browser.new_page(**options)
            tab.on("request", lambda r: None if r.url in (out.as_uri(), "data:,") else wrong.append(r.url))
            tab.on("pageerror", lambda error: wrong.append(str(error)))
            tab.on("console", lambda said: wrong.append(said.text))
            tab.goto(out.as_uri())
            return tab

        yield opened
        browser.close()
        assert wrong == []


def test_arms_are_toggled_in_every_chart(open_page, tmp_path):
    tab = open_page(write_runs(tmp_path / "runs", seeds=2))
    drawn = tab.locator('.chart g[data-arm="1"]')
    assert drawn.count() == tab.locator("svg.plot").count()
    assert tab.locator('.chart g[data-arm="1"] .band').first.is_visible()
    tab.get_by_role("checkbox", name="GRPO-MR").focus()
    tab.keyboard.press("Space")
    assert tab.locator('.chart [data-arm="1"]:visible').count() == 0
    assert tab.locator('.chart g[data-arm="2"]').first.is_visible()
    tab.keyboard.press("Space")
    assert tab.locator('.chart g[data-arm="1"]').first.is_visible()


def test_rollouts_are_filtered_and_sorted(open_page, tmp_path):
    tab = open_page([write_run(tmp_path / "r", estimator="mt-grpo", seed=0)])
    cards = tab.locator(".card:visible")
    everything = cards.count()
    tab.get_by_label("Outcome").select_option("wrong")
    assert 0 < cards.count() < everything
    assert set(cards.locator("header b").all_text_contents()) == {"✗ wrong"}
    tab.get_by_label("Outcome").select_option("all")
    tab.get_by_label("Order").select_option("credit")
    numbers = [
        max(abs(float(a.replace("−", "-"))) for a in card.locator(".adv").all_text_contents()) for card in cards.all()
    ]
    assert len(numbers) == everything
    assert numbers == sorted(numbers, reverse=True)
    tab.get_by_label("credit against").check()
    assert cards.count() == tab.locator(".card:visible:has(.against)").count() < everything
    assert tab.locator(".filters output").text_content().endswith(" of 12 rollouts")


def test_the_step_slider_moves_by_arrow_keys(open_page, tmp_path):
    tab = open_page([write_run(tmp_path / "r", estimator="mt-grpo", seed=0)])
    slider = tab.get_by_role("slider")
    slider.focus()
    for key, step in (("Home", "1"), ("ArrowRight", "30"), ("ArrowRight", "60"), ("ArrowLeft", "30")):
        tab.keyboard.press(key)
        assert tab.locator("details.group:visible").get_attribute("data-step") == step
        assert slider.get_attribute("aria-valuetext") == f"step {step}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_light_and_dark(open_page, tmp_path, scheme):
    tab = open_page(write_runs(tmp_path / "runs", seeds=1), viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[scheme]


def test_credit_against_a_turns_own_reward_is_found(tmp_path):
    # own rewards 1, 0: better ½, −½; the first turn of the first is blamed, of the second praised
    lines, config = credited([1.0, 0.0], [0.0, 1.0], [(-0.2, -0.7), (0.2, 0.7)])
    path = bare_run(tmp_path / "r", [line(0)], **config)
    write_lines(path / "rollouts.jsonl", [{**json.loads(x), "step": 1} for x in lines])
    assert transcripts.against_own_reward(load_run(path).rollouts) == [(0,), (0,)]


@needs_browser
def test_hostile_rollouts_do_nothing_in_a_browser(tmp_path):
    out = write_report([load_run(hostile_run(tmp_path / "r"))], tmp_path / "report.html")
    dom, console = browse(out, tmp_path)
    assert console == ""
    assert "<title>Turnwise report</title>" in dom
    assert 'class="js"' in dom


@needs_browser
def test_the_policy_stops_a_script_that_got_into_the_page(tmp_path):
    out = write_report([load_run(hostile_run(tmp_path / "r"))], tmp_path / "report.html")
    out.write_text(out.read_text().replace("</main>", "<script>document.title='owned'</script></main>"))
    dom, console = browse(out, tmp_path)
    assert "<title>Turnwise report</title>" in dom
    assert "Content Security Policy" in console


def test_the_fixtures_rewards_are_the_papers():
    rng = np.random.default_rng(0)
    rollouts = [a_rollout(FACTS[0], 0, 1.0, 1.0, rng) for _ in range(3)]
    assert sum(rollouts[0].turn_rewards[0].values()) == pytest.approx(0.7)
    assert advantages("mt-grpo", rollouts) == [[0.0, 0.0]] * 3
