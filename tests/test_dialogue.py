"""Evaluation in messages: any endpoint in the run's environment, retries, costs; pass@k."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from turnwise import metrics
from turnwise.cli import main
from turnwise.endpoint import EndpointConfig
from turnwise.errors import InputError, RunError
from turnwise.evaluation import bootstrap, evaluate, evaluation_to_dict, summarised, write_evaluation
from turnwise.types import Action, Rollout, Task, Turn, rollout_from_json

TASKS = [
    Task(id="k", question="What is the capital of Kenya?", answers=("Nairobi",), kind="africa"),
    Task(id="p", question="What is the capital of Peru?", answers=("Lima",), kind="america"),
]
ANSWERS = {"Kenya": "Nairobi", "Peru": "Lima"}

Say = Callable[[list[dict[str, str]], int], Any]


def searches_and_answers(messages: list[dict[str, str]], _: int) -> str:
    """A perfect agent in the tags of protocol `tools`."""
    name = next(name for name in ANSWERS if name in messages[1]["content"])
    if len(messages) == 2:
        return f'<reasoning>\nx\n</reasoning>\n<tool>\n{{"name": "search", "args": {{"query": "{name}"}}}}\n</tool>'
    return f"<reasoning>\nx\n</reasoning>\n<answer>\n{ANSWERS[name]}\n</answer>"


class Model:
    """An endpoint that says what a function of the messages and the request's number says, or gives a status."""

    def __init__(self, say: Say) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                model.requests.append(body)
                model.keys.append(self.headers["Authorization"])
                said = say(body["messages"], len(model.requests))
                finish, said = said if isinstance(said, tuple) else ("stop", said)
                message = said if isinstance(said, dict) else {"content": said}
                choice = {"message": {"role": "assistant", **message}, "finish_reason": finish}
                usage = {"prompt_tokens": 50, "completion_tokens": 7}
                content = json.dumps({"choices": [choice], "usage": usage}).encode()
                self.send_response(said if isinstance(said, int) else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def config(self) -> EndpointConfig:
        url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        return EndpointConfig(url=url, model="org/some-model", backoff_s=0.0, timeout_s=20)


@pytest.fixture
def model() -> Iterator[Callable[[Say], Model]]:
    models: list[Model] = []

    def started(say: Say) -> Model:
        models.append(Model(say))
        return models[-1]

    yield started
    for running in models:
        running.server.shutdown()
        running.server.server_close()
        running.thread.join()


def answering(text: str) -> Say:
    return lambda _messages, _number: text


# ---- the endpoint in the run's environment ----


def test_an_endpoint_plays_in_the_environment_of_training(model):
    agent = model(searches_and_answers)
    found = evaluate(tasks=TASKS, endpoint=agent.config)
    assert (found.name, found.mode) == ("tasks-org-some-model", "greedy")
    assert found.metrics["exact_match"].mean == found.metrics["tool_execution"].mean == 1.0
    assert found.metrics["answer_in_results"].mean == 1.0
    assert "tokens" not in found.metrics  # nobody counted them
    rollout = found.records[0][1]
    assert [turn.action_ids for turn in rollout.turns] == [(), ()]
    assert "Nairobi" in rollout.turns[0].results[0].text
    assert rollout_from_json(rollout.to_json()) == rollout


def test_the_messages_are_those_of_the_conversation(model):
    agent = model(searches_and_answers)
    evaluate(tasks=TASKS[:1], endpoint=agent.config, max_turn_tokens=99)
    first, second = agent.requests
    assert [m["role"] for m in first["messages"]] == ["system", "user"]
    assert first["messages"][0]["content"].startswith('Tools:\n{"name": "search"')
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][3]["content"].startswith("<result>\n")
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("org/some-model", 0.0, 99)


def test_under_a_models_own_format_calls_come_and_go_in_openais_shape(model, tmp_path):
    """Two calls at once, then one whose arguments are no object, then the answer."""

    def say(_messages: list[dict[str, Any]], number: int) -> Any:
        two = [{"query": "Kenya"}, {"query": "Peru"}]
        arguments = {1: [json.dumps(a) for a in two], 2: ["[1]"]}.get(number)
        if arguments is None:
            return "<answer>Nairobi</answer>"
        function = [{"id": f"x{k}", "function": {"name": "search", "arguments": a}} for k, a in enumerate(arguments)]
        return {"content": None, "tool_calls": function}

    agent = model(say)
    config = tmp_path / "native.toml"
    config.write_text('protocol = "native"\nmax_turns = 4\n')
    found = evaluate(config, tasks=TASKS[:1], endpoint=agent.config)
    rollout = found.records[0][1]
    assert found.metrics["exact_match"].mean == 1.0
    assert [len(turn.results) for turn in rollout.turns] == [2, 1, 0]
    assert ["Nairobi" in rollout.turns[0].results[0].text, "Lima" in rollout.turns[0].results[1].text] == [True, True]
    assert rollout.turns[1].results[0].error == "bad_arguments"
    assert [tool["function"]["name"] for tool in agent.requests[0]["tools"]] == ["search"]
    first, second = agent.requests[1]["messages"], agent.requests[2]["messages"]
    assert [m["role"] for m in first] == ["system", "user", "assistant", "tool", "tool"]
    assert [call["id"] for call in first[2]["tool_calls"]] == [m["tool_call_id"] for m in first[3:]]
    ids = [call["id"] for m in second for call in m.get("tool_calls", ())]
    assert len(set(ids)) == 3
    assert second[-1]["tool_call_id"] == ids[2]


def test_seeds_of_samples_and_turns_differ_and_are_the_same_again(model):
    agent = model(searches_and_answers)
    for _ in range(2):
        evaluate(tasks=TASKS[:1], endpoint=agent.config, mode="sampled", samples=3)
    seeds = [request["seed"] for request in agent.requests]
    assert sorted(seeds[:6]) == sorted(seeds[6:])
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert {request["temperature"] for request in agent.requests} == {1.0}


def test_costs_are_counted_and_written(model, tmp_path):
    agent = model(searches_and_answers)
    found = evaluate(tasks=TASKS, endpoint=agent.config)
    costs = {name: value for name, value in found.endpoint.items() if name != "seconds"}
    assert costs == {"requests": 4, "retried": 0, "prompt_tokens": 200, "completion_tokens": 28}
    path = write_evaluation(tmp_path, found)
    assert json.loads(path.read_text())["endpoint"] == found.endpoint
    assert len(path.with_suffix(".jsonl").read_text().splitlines()) == 2


def test_failures_that_pass_are_tried_again(model):
    agent = model(lambda messages, number: 503 if number == 1 else searches_and_answers(messages, number))
    found = evaluate(tasks=TASKS[:1], endpoint=agent.config)
    assert found.endpoint["retried"] == 1
    assert found.metrics["exact_match"].mean == 1.0


def test_an_endpoint_that_fails_once_costs_that_rollout_alone(model):
    def say(messages: list[dict[str, str]], number: int) -> Any:
        return 400 if "Peru" in messages[1]["content"] else searches_and_answers(messages, number)

    agent = model(say)
    found = evaluate(tasks=TASKS, endpoint=agent.config)
    assert [rollout.stop for _, rollout in found.records] == ["answer", "error"]
    assert "the endpoint gave no reply: status 400" in (found.records[1][1].error or "")
    assert found.metrics["exact_match"].n == 1
    assert len(agent.requests) == 3  # a bad request is not repeated


def test_an_endpoint_that_always_fails_is_an_error(model):
    with pytest.raises(RunError, match="rollouts must not all fail; all 2 did: the endpoint gave no reply: status 500"):
        evaluate(tasks=TASKS, endpoint=model(answering(500)).config)  # type: ignore[arg-type]


def test_a_message_that_was_cut_off_ends_the_rollout(model):
    agent = model(lambda _messages, _number: ("length", "<answer>\nNairobi\n</answer>"))
    found = evaluate(tasks=TASKS[:1], endpoint=agent.config)
    assert found.records[0][1].stop == "max_tokens"
    assert found.metrics["answered"].mean == 0.0


def test_the_key_is_sent_and_is_in_no_file(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-hidden")
    agent = model(searches_and_answers)
    url = agent.config.url
    options = ["--endpoint", url, "--model", "m", "--key-env", "MY_KEY", "--limit", "1", "--out", str(tmp_path)]
    config = tmp_path / "mine.toml"
    tasks = tmp_path / "t.jsonl"
    lines = [{"id": task.id, "question": task.question, "answers": list(task.answers)} for task in TASKS]
    tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config.write_text("max_turn_tokens = 300\n")
    assert main(["eval", str(config), "--tasks", str(tasks), *options]) == 0
    assert set(agent.keys) == {"Bearer sk-hidden"}
    assert agent.requests[0]["max_tokens"] == 300
    written = sorted(path.name for path in tmp_path.glob("eval-*"))
    assert written == ["eval-t-m-greedy.json", "eval-t-m-greedy.jsonl"]
    assert not any("sk-hidden" in path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--endpoint", "localhost:8000", "--model", "m"], "endpoint must be an http"),
        (["--endpoint", "http://h/v1"], "model must name the endpoint's model"),
        (["--model", "m"], "model and key-env must come with an endpoint"),
        (["--endpoint", "http://h/v1", "--model", "m", "--key-env", "sk-1"], "key-env must be the name of an environ"),
        (["--samples", "2", "--mode", "greedy"], "samples must go with mode sampled"),
        (["--samples", "2", "--pass-at", "1,4"], "pass-at between 1 and samples; got 2 and 1, 4"),
        (["--pass-at", "one"], "pass-at must be whole numbers with commas between"),
        (["--out", "no/such/folder"], "out must be a folder"),
        (["--engine", "vllm", "--limit", "1"], "engine vllm must find the package vllm"),
        (["--endpoint", "http://h/v1", "--model", "m", "--engine", "hf"], "own model plays; got engine hf"),
        (["--endpoint", "http://h/v1", "--model", "m", "--checkpoint", "last"], "own model plays; got checkpoint last"),
    ],
)
def test_bad_options_are_one_line(args: list[str], says: str, capsys: pytest.CaptureFixture):
    assert main(["eval", "embedded", *args]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert "sk-1" not in captured.err


def test_an_endpoint_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture):
    args = ["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--limit", "1", "--timeout-s", "1"]
    assert main(["eval", "nowhere.toml", *args]) == 2
    assert "a run must be a run directory, a file of options" in capsys.readouterr().err


# ---- pass@k ----


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample():
    # 5 samples, 2 correct, k = 3: of C(5,3) = 10 subsets, only the one of the 3 wrong ones has none: 9/10.
    assert metrics.pass_at(3, samples=5, correct=2) == pytest.approx(0.9)
    for n, c in itertools.product(range(1, 7), range(7)):
        outcomes = [True] * c + [False] * (n - c)
        for k in range(1, n + 1) if c <= n else ():
            subsets = list(itertools.combinations(outcomes, k))
            assert metrics.pass_at(k, samples=n, correct=c) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_1_is_the_mean_and_pass_at_n_whether_any_was_right():
    assert metrics.pass_at(1, samples=8, correct=3) == 3 / 8
    assert [metrics.pass_at(8, samples=8, correct=c) for c in (0, 1, 8)] == [0.0, 1.0, 1.0]


def test_pass_at_k_is_unbiased():
    # The chance that one of 2 independent samples is right, each with p = 0.3: 1 - 0.7² = 0.51.
    n, p = 5, 0.3
    chances = [metrics.math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    expected = sum(w * metrics.pass_at(2, samples=n, correct=c) for c, w in enumerate(chances))
    assert expected == pytest.approx(0.51)


@pytest.mark.parametrize(("k", "samples", "correct"), [(0, 3, 1), (4, 3, 1), (1, 3, 4), (1, 3, -1)])
def test_numbers_that_cannot_be_are_refused(k: int, samples: int, correct: int):
    with pytest.raises(InputError, match="1 <= k <= samples"):
        metrics.pass_at(k, samples=samples, correct=correct)


def answered(answer: str, *, stop: Any = "answer") -> Rollout:
    turn = Turn(action_ids=(1,), sampling_logprobs=(0.0,), text="", action=Action(answer=answer))
    return Rollout(task_id="", group=0, prompt_ids=(), turns=(turn,), stop=stop)


def test_intervals_are_over_questions_and_samples_average_within_them():
    # Question k: 2 of 4 right, question p: none of 4. Means .5 and 0, pass@2: 1 - C(2,2)/C(4,2) = 5/6, and 0.
    pairs = [(TASKS[0], answered(text)) for text in ("Nairobi", "x", "Nairobi", "y")]
    pairs += [(TASKS[1], answered("x")) for _ in range(4)]
    found = summarised("n", "sampled", pairs, pass_at=(1, 2))
    assert found.metrics["exact_match"] == bootstrap([0.5, 0.0])
    assert found.metrics["pass@1"] == found.metrics["exact_match"]
    assert found.metrics["pass@2"] == bootstrap([5 / 6, 0.0])
    assert found.by_kind["africa"]["pass@2"].mean == pytest.approx(5 / 6)
    assert evaluation_to_dict(found)["metrics"]["pass@2"]["n"] == 2


def test_a_question_with_too_few_samples_left_has_no_pass_at_k():
    pairs = [(TASKS[0], answered("Nairobi")), (TASKS[0], answered("x", stop="error"))]
    pairs += [(TASKS[1], answered("Lima")), (TASKS[1], answered("x"))]
    found = summarised("n", "sampled", pairs, pass_at=(1, 2))
    assert (found.metrics["pass@1"].n, found.metrics["pass@2"].n) == (2, 1)
    assert (found.metrics["pass@1"].mean, found.metrics["pass@2"].mean) == (0.75, 1.0)


def test_a_policys_samples_are_drawn_and_pass_at_k_grows_with_k(tmp_path: Path, capsys: pytest.CaptureFixture):
    args = ["--limit", "6", "--samples", "4", "--pass-at", "1,2,4", "--out", str(tmp_path), "--name", "few"]
    assert main(["eval", "embedded", *args]) == 0
    assert "pass@4" in capsys.readouterr().out
    found: Mapping[str, Any] = json.loads((tmp_path / "eval-few-sampled.json").read_text())["metrics"]
    assert found["pass@1"]["mean"] <= found["pass@2"]["mean"] <= found["pass@4"]["mean"]
    assert found["pass@1"]["mean"] == pytest.approx(found["exact_match"]["mean"])
    assert found["pass@1"]["n"] == 6
    lines = (tmp_path / "eval-few-sampled.jsonl").read_text().splitlines()
    texts = {json.dumps(json.loads(line)["rollout"]["turns"][0]["text"]) for line in lines}
    assert len(lines) == 24
    assert len(texts) > 6
