"""The command line: real processes for what is cheap, `main` for what needs torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from turnwise.cli import COMMANDS, main


def turnwise(*args: str, **kwargs) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "turnwise.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **kwargs)


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("turnwise: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "articles.jsonl"
    articles = [
        {"id": "k", "title": "Kenya \x1b[2J", "text": "The capital of Kenya is Nairobi."},
        {"id": "p", "title": "Peru", "text": "The capital of Peru is Lima."},
    ]
    path.write_text("".join(json.dumps(a) + "\n" for a in articles))
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "capitals.jsonl"
    facts = [("Kenya", "Nairobi", "africa"), ("Peru", "Lima", "america")]
    lines = [
        {
            "id": f"{i}",
            "question": f"What is the capital of {name}?",
            "answers": [city],
            "kind": kind,
        }
        for i, (name, city, kind) in enumerate(facts * 4)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


SMALL = [
    "--steps=2",
    "--tasks-per-step=2",
    "--group-size=2",
    "--passes=1",
    "--minibatches=1",
    "--validation-size=2",
    "--max-turn-tokens=6",
    "--checkpoint-every=1",
]


@pytest.fixture(scope="module")
def run(checkpoint: Path, corpus: Path, tasks: Path, tmp_path_factory) -> Path:
    """A run that was trained by the command, from a configuration file and flags."""
    folder = tmp_path_factory.mktemp("runs")
    config = folder / "small.toml"
    data = {"policy": checkpoint, "corpus": corpus, "tasks": tasks, "validation_tasks": tasks}
    config.write_text("".join(f'{k} = "{v}"\n' for k, v in data.items()) + "seed = 3\nsteps = 9\n")
    assert main(["train", str(config), *SMALL, "--out", str(folder / "r")]) == 0
    return folder / "r"


# --- help and mistakes ----------------------------------------------------------------------------


def test_help_lists_every_command():
    done = turnwise("--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


def test_without_a_command_the_usage_is_shown_and_the_code_is_2(capsys: pytest.CaptureFixture):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: turnwise COMMAND")


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "turnwise 0.1.0\n"


@pytest.mark.parametrize("name", [n for n in COMMANDS if n != "warmup"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture):
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: turnwise {name}" in out


def test_an_option_left_out_is_no_choice_to_name(capsys: pytest.CaptureFixture):
    assert main(["eval", "somewhere", "--split", "foo"]) == 2
    said = capsys.readouterr().err
    assert all(f"'{split}'" in said for split in ("train", "validation", "test"))
    assert "None" not in said


def test_a_misspelt_command_is_told_the_nearest():
    assert "did you mean search" in one_line_error(turnwise("serch", "x"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "--estimator", "mt-grop"], "did you mean mt-grpo"),
        (["train", "--gamma", "3"], "gamma must be in"),
        (["train", "--stepz", "3"], "Unrecognized options: --stepz, 3; perhaps --steps; "),
        (["train", "--steps", "three"], "--steps: invalid literal for int() with base 10: 'three'"),
        (["search"], "A question or a few words. (required)"),
        (["eval", "somewhere", "--mode", "gredy"], "invalid choice 'gredy' for argument '--mode'. Expected one of"),
        (["train", "nowhere.toml"], "nowhere.toml"),
        (["train", "--steps", "3", "late.toml"], "must come before the options"),
        (["reproduce", "--estimators", "grpo-rr"], "did you mean"),
        (["warmup", "--protocol", "serch"], "did you mean search"),
        (["warmup", "--protocol=search"], "--start"),
        (["report"], "at least one run"),
        (["report", "nowhere"], "nowhere must be a run directory"),
        (["search", "x", "--corpus", "nowhere"], "a corpus must be"),
        (["convert", "a", "b.jsonl", "--format", "squd"], "did you mean squad"),
        (["eval", "nowhere"], "a run must be"),
        (["eval", "nowhere", "--name", "../x"], "name must be"),
        (["ask", "nowhere", " "], "question must not be blank"),
    ],
)
def test_bad_input_is_one_line_and_code_2(args: list[str], words: str, capsys):
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("turnwise: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


@pytest.mark.parametrize(
    ("line", "words"),
    [("stesp = 3", "did you mean steps"), ("steps = 'ten'", "steps must be"), ("steps =", "TOML")],
)
def test_a_configuration_file_is_checked_like_flags(line: str, words: str, tmp_path: Path, capsys):
    (tmp_path / "c.toml").write_text(line)
    assert main(["train", str(tmp_path / "c.toml")]) == 2
    assert words in capsys.readouterr().err


def test_a_missing_extra_says_what_to_install():
    # None in sys.modules makes an import fail as if the package were not there
    code = "import sys; sys.modules['torch'] = None; from turnwise.cli import main"
    command = [sys.executable, "-c", f"{code}; sys.exit(main(['eval', 'embedded']))"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert 'needs torch; install it: pip install "turnwise[train]"' in one_line_error(done)


def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "turnwise.cli", "search", "Kenya", "--k", "50"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("args", [["search", "Kenya"], ["--help"], ["credit", "--help"]])
def test_a_full_disk_behind_the_output_is_one_line(args: list[str]):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "turnwise.cli", *args]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("turnwise: the output must have room; got No space left on device")
    assert done.stderr.count("\n") == 1


def test_an_interruption_is_one_line_and_code_130(monkeypatch, capsys):
    def interrupted(_args: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("turnwise.cli.run_command", interrupted)
    assert main([]) == 130
    assert capsys.readouterr().err == "turnwise: interrupted\n"


def test_an_error_of_ours_among_concurrent_ones_is_one_line(monkeypatch, capsys):
    from turnwise.errors import InputError

    def failing(_args: list[str]) -> int:
        raise ExceptionGroup("tasks", [ExceptionGroup("inner", [InputError("too\nlong")])])

    monkeypatch.setattr("turnwise.cli.run_command", failing)
    assert main([]) == 2
    assert capsys.readouterr().err == "turnwise: too long\n"


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    def failing(_args: list[str]) -> int:
        raise ExceptionGroup("tasks", [ZeroDivisionError()])

    monkeypatch.setattr("turnwise.cli.run_command", failing)
    with pytest.raises(ExceptionGroup):
        main([])


# --- search and convert ---------------------------------------------------------------------------


def test_search_prints_the_best_article_first_and_nothing_hostile(corpus: Path, tmp_path: Path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = turnwise("search", "capital of Kenya", "--corpus", str(corpus), env=environment)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert done.stdout.startswith("1. Kenya ␛[2J")
    assert "\nThe capital of Kenya is Nairobi.\n" in done.stdout


def test_convert_writes_tasks_and_corpus(tmp_path: Path):
    answer = {"text": "Nairobi", "answer_start": 0}
    questions = [{"id": "1", "question": "Capital of Kenya?", "answers": [answer]}]
    paragraph = {"context": "Nairobi is the capital of Kenya.", "qas": questions}
    squad = {"version": "1.1", "data": [{"title": "Kenya", "paragraphs": [paragraph]}]}
    (tmp_path / "dev.json").write_text(json.dumps(squad))
    done = turnwise("convert", str(tmp_path / "dev.json"), str(tmp_path / "dev.jsonl"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"1 tasks of squad in {tmp_path / 'dev.jsonl'}",
        f"1 passages in {tmp_path / 'dev.corpus.jsonl.gz'}",
    ]


# --- train, eval, ask, report ---------------------------------------------------------------------


def test_train_takes_the_file_and_flags_override_it(run: Path):
    config = json.loads((run / "config.json").read_text())["config"]
    assert (config["seed"], config["steps"], config["group_size"]) == (3, 2, 2)


def test_a_runs_configuration_trains_again_to_the_same_numbers(run: Path, tmp_path: Path, capsys):
    assert main(["train", str(run / "config.json"), "--out", str(tmp_path / "again")]) == 0
    out = capsys.readouterr().out
    assert f"turnwise report {tmp_path / 'again'}" in out
    assert len([line for line in out.splitlines() if line.startswith("train ")]) == 2
    values = []
    for folder in (run, tmp_path / "again"):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        values.append([line["metrics"]["exact_match"] for line in lines])
    assert values[0] == values[1]


def test_training_into_a_directory_that_holds_a_run_is_refused(run: Path, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["train", str(run / "config.json")]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_eval_writes_numbers_and_a_line_per_question(run: Path, capsys: pytest.CaptureFixture):
    assert main(["eval", str(run), "--name", "mine", "--limit", "3", "--checkpoint", "last"]) == 0
    out = capsys.readouterr().out
    written = json.loads((run / "eval-mine-greedy.json").read_text())
    lines = (run / "eval-mine-greedy.jsonl").read_text().splitlines()
    assert written["metrics"]["exact_match"]["n"] == len(lines) == 3
    record = json.loads(lines[0])
    assert record["task"]["question"] == "What is the capital of Kenya?"
    assert record["metrics"]["turns"] == len(record["rollout"]["turns"])
    assert "eval-mine-greedy.json" in out
    assert "africa" in out


def test_eval_of_a_checkpoint_in_a_run_plays_with_the_runs_tools(run: Path, capsys):
    assert main(["eval", str(run / "best"), "--mode", "sampled"]) == 0
    assert "validation, sampled" in capsys.readouterr().out
    assert not (run / "best" / "eval-validation-sampled.json").exists()


def test_a_split_that_a_file_does_not_have_is_refused(run: Path, capsys):
    assert main(["eval", str(run), "--split", "test"]) == 2
    assert "train or validation" in capsys.readouterr().err


def test_eval_of_a_run_without_metrics_says_that_it_is_not_whole(run: Path, tmp_path: Path, capsys):
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    assert main(["eval", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "must be a run with metrics; it has a configuration but no metrics.jsonl" in said
    assert f"turnwise train --resume --out {tmp_path}" in said


def test_names_that_python_gives_are_checked_before_anything_is_read(run: Path, tasks: Path):
    import turnwise as tw
    from turnwise.errors import ConfigError, InputError

    for options, words in (
        ({"mode": "gredy"}, "mode must be a known name; got 'gredy'; did you mean greedy"),
        ({"checkpoint": "lasst"}, "checkpoint must be a known name; got 'lasst'; did you mean last"),
    ):
        for call in (tw.evaluate, tw.rollouts):
            with pytest.raises(ConfigError, match=words):
                call("nowhere", **options)  # pyright: ignore
    with pytest.raises(ConfigError, match="split must be a known name; got 'tset'; did you mean test"):
        tw.evaluate("nowhere", split="tset")  # pyright: ignore
    for call in (tw.evaluate, tw.rollouts):
        with pytest.raises(InputError, match="tasks must be at least one; got none"):
            call(run, [])


def test_ask_shows_the_turns_or_that_they_were_cut_off(run: Path, capsys):
    assert main(["ask", str(run), "What is the capital of Kenya?"]) == 0
    out = capsys.readouterr().out
    assert "turn 1" in out or "cut off" in out


def test_ask_that_does_not_fit_the_context_is_one_line(run: Path, capsys):
    assert main(["ask", str(run), "why " * 2000]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("turnwise: the prompt")
    assert said.endswith("shorten it, or take a policy with a longer context")


def test_report_prints_the_table_and_writes_the_page(run: Path, capsys):
    assert main(["report", str(run)]) == 0
    assert "MT-GRPO" in capsys.readouterr().out
    assert (run / "report.html").read_text().lower().startswith("<!doctype html>")


def test_python_calls_give_the_same_as_commands(run: Path, tasks: Path):
    import turnwise as tw

    evaluation = tw.evaluate(run, tasks, limit=2)
    assert evaluation.metrics["exact_match"].n == 2
    chosen = tw.load_tasks(tasks)[:2]
    groups = tw.rollouts(run, chosen, group_size=3, max_turns=1)
    assert [len(group) for group in groups] == [3, 3]
    assert [group[0].task_id for group in groups] == [task.id for task in chosen]
    assert all(len(rollout.turns) == 1 and rollout.outcome_rewards for rollout in groups[0])
    assert groups == tw.rollouts(run, chosen, group_size=3, max_turns=1)
