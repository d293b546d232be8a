"""The chat server: the official client of OpenAI against the embedded policies, both protocols."""

import asyncio
import dataclasses
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import uvicorn
from openai import OpenAI

from chats import needs_data, published
from turnwise.config import TrainConfig
from turnwise.endpoint import EndpointConfig
from turnwise.engine import ScriptedEngine
from turnwise.env import ToolEnvironment
from turnwise.errors import ConfigError, RunError
from turnwise.evaluation import evaluate
from turnwise.policy import load_policy
from turnwise.rollout import run_rollout
from turnwise.serving.app import listening, load_served, make_app, server
from turnwise.serving.talk import Served
from turnwise.types import Rollout, Task
from turnwise.web import token_in

KENYA = "What is the capital of Kenya?"
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search short articles by their words; returns those that match best.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}


@dataclass
class Running:
    """A server on loopback, in a thread of its own."""

    served: Served
    client: OpenAI
    url: str
    server: uvicorn.Server

    def ask(self, content: str = KENYA, **options: Any) -> Any:
        asked = {"model": self.served.name, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        return self.client.chat.completions.create(**{**asked, **options})


def started(served: Served, *, token: str | None = None) -> Iterator[Running]:
    with listening("127.0.0.1", 0, token=token) as sock:
        http = server(make_app(served, token=token))
        thread = threading.Thread(target=http.run, kwargs={"sockets": [sock]})
        thread.start()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        with OpenAI(base_url=url, api_key=token or "none", max_retries=0, timeout=60) as client:
            yield Running(served, client, url, http)
        http.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def tools() -> Iterator[Running]:
    """The agent that searches once."""
    yield from started(load_served("embedded"))


@pytest.fixture(scope="module")
def searcher() -> Iterator[Running]:
    """The agent that searches several times, in the tags of protocol `search`."""
    yield from started(load_served("embedded-search", name="searcher"))


THOUGHT = "<reasoning>\nLet me search first.\n</reasoning>\n"
CALL = f'{THOUGHT}<tool>\n{{"name": "search", "args": {{"query": "Kenya"}}}}\n</tool>'
ANSWER = "<reasoning>\nIt says so.\n</reasoning>\n<answer>\nNairobi, I think\n</answer>"


def scripted_reply(prompt: str) -> str:
    """What the scripted agent says: by the question, and once it has a result, its answer."""
    if "</result>" in prompt:
        return ANSWER
    said = {"broken": f"{THOUGHT}<tool>\nsearch Kenya\n</tool>", "aimless": "Hm.", "unclosed": "<answer>\nNairobi"}
    return next((reply for word, reply in said.items() if f"a {word} reply" in prompt), CALL)


@pytest.fixture(scope="module")
def scripted(tools: Running) -> Iterator[Running]:
    """An agent that always searches once, with the embedded agent's tools and tokens."""
    served = dataclasses.replace(
        tools.served, name="scripted", engine=ScriptedEngine(scripted_reply, tools.served.chat)
    )
    yield from started(served)


def played(served: Served, question: str, *, temperature: float = 0.0, seed: int = 0) -> Rollout:
    """The rollout that the run's own environment makes of a question."""
    task = Task(id="q", question=question, answers=())
    config = served.config
    environment = ToolEnvironment(task, served.tools, max_turns=config.max_turns, protocol=config.protocol)
    engine: Any = served.engine
    if not isinstance(engine, ScriptedEngine):  # that of the server belongs to its thread
        engine = load_served("embedded" if config.protocol == "tools" else "embedded-search").engine
    work = run_rollout(task, environment, engine, served.chat, limits=served.limits, temperature=temperature, seed=seed)
    return asyncio.run(work)


def parts(stream: Any) -> list[Any]:
    return list(stream)


def content_of(chunks: list[Any]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


# ---- the agent ----


@pytest.mark.parametrize("which", ["tools", "searcher", "scripted"])
def test_the_agent_answers_with_the_rollout_of_training(which: str, request: pytest.FixtureRequest):
    running: Running = request.getfixturevalue(which)
    rollout = played(running.served, KENYA)
    response = running.ask()
    own = response.model_extra["turnwise"]
    assert [step["text"] for step in own["steps"]] == [turn.text for turn in rollout.turns]
    assert (own["stop"], own["answer"]) == (rollout.stop, rollout.answer)
    assert response.choices[0].message.content == (rollout.answer or rollout.turns[-1].text)
    assert response.choices[0].finish_reason == ("stop" if rollout.terminated else "length")
    sampled = sum(len(turn.action_ids) for turn in rollout.turns)
    assert response.usage.completion_tokens == sampled
    assert response.usage.total_tokens == rollout.num_tokens
    results = [[result["text"] for result in step["results"]] for step in own["steps"]]
    assert results == [[result.text for result in turn.results] for turn in rollout.turns]


@pytest.mark.parametrize(
    ("which", "seed"), [("tools", 0), ("tools", 1), ("tools", 2), ("searcher", 0), ("searcher", 1), ("scripted", 0)]
)
def test_a_stream_put_together_is_the_whole_response(which: str, seed: int, request: pytest.FixtureRequest):
    running: Running = request.getfixturevalue(which)
    options: dict[str, Any] = {"temperature": 1.0, "seed": seed}
    whole = running.ask(**options)
    chunks = parts(running.ask(stream=True, stream_options={"include_usage": True}, **options))
    assert content_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    steps = [c.model_extra["turnwise"]["step"] for c in chunks if "step" in (c.model_extra or {}).get("turnwise", {})]
    assert steps == [step for step in whole.model_extra["turnwise"]["steps"] if step["results"]]


def test_equal_seeds_answer_alike_and_others_otherwise(tools: Running):
    texts = [
        tuple(step["text"] for step in tools.ask(temperature=1.5, seed=seed).model_extra["turnwise"]["steps"])
        for seed in (5, 5, 6, 7)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_a_budget_of_tokens_is_over_all_turns(scripted: Running):
    whole = scripted.ask()
    first, _ = whole.model_extra["turnwise"]["steps"]
    spent = whole.usage.completion_tokens
    cut = scripted.ask(max_tokens=spent - 1)  # without the token that closes the message
    assert cut.usage.completion_tokens == spent - 1
    assert cut.choices[0].finish_reason == "length"
    assert cut.model_extra["turnwise"]["stop"] == "max_tokens"
    assert cut.model_extra["turnwise"]["steps"][0] == first
    assert cut.choices[0].message.content == "Nairobi, I think"  # as far as it came
    assert scripted.ask(max_completion_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize(
    ("word", "content", "stop"),
    [
        ("aimless", "Hm.", "no_action"),
        ("unclosed", "Nairobi", "no_action"),
        ("broken", "Nairobi, I think", "answer"),  # an error result goes back to the agent, as in training
    ],
)
def test_messages_that_are_no_answer(scripted: Running, word: str, content: str, stop: str):
    question = f"Give me a {word} reply."
    response = scripted.ask(question)
    assert response.choices[0].message.content == content
    assert response.model_extra["turnwise"]["stop"] == stop
    assert content_of(parts(scripted.ask(question, stream=True))) == content


def test_what_the_client_says_before_stands_between_rules_and_question(tools: Running):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of Peru?"},
        {"role": "assistant", "content": "Lima"},
        {"role": "user", "content": [{"type": "text", "text": KENYA}]},
    ]
    longer = tools.ask(messages=messages)
    assert longer.usage.prompt_tokens > tools.ask().usage.prompt_tokens
    assert longer.model_extra["turnwise"]["steps"]


def test_concurrent_requests_are_drawn_together_and_each_gets_its_own(tools: Running):
    names = ["Kenya", "Peru", "Japan", "France", "Egypt", "Chile", "Norway", "India"]
    questions = [f"What is the capital of {name}?" for name in names]
    alone = [tools.ask(question).choices[0].message.content for question in questions]
    stats = tools.served.engine.stats  # pyright: ignore
    steps, tokens = stats.decode_steps, stats.decoded_tokens
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda question: tools.ask(question).choices[0].message.content, questions))
    assert together == alone
    assert stats.decoded_tokens - tokens > 1.2 * (stats.decode_steps - steps)


# ---- calls that the client executes ----


def test_calls_come_back_in_openais_shape_and_the_conversation_goes_on_with_the_very_tokens(scripted: Running):
    rollout = played(scripted.served, KENYA)
    messages: list[Any] = [{"role": "user", "content": KENYA}]
    first = scripted.ask(messages=messages, tools=[SEARCH])
    message = first.choices[0].message
    (call,) = message.tool_calls
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.model_extra["reasoning_content"] == "Let me search first."
    assert (call.function.name, json.loads(call.function.arguments)) == ("search", {"query": "Kenya"})
    found = rollout.turns[0].results[0].text
    messages += [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": found}]
    second = scripted.ask(messages=messages, tools=[SEARCH])
    assert second.choices[0].finish_reason == "stop"
    assert second.choices[0].message.content == rollout.answer
    turn = rollout.turns[0]
    grown = second.usage.prompt_tokens - first.usage.prompt_tokens
    assert grown == len(turn.action_ids) + len(turn.reply_ids)


def test_a_call_that_cannot_be_read_is_shown_as_it_was_written(scripted: Running):
    asked: dict[str, Any] = {"content": "Give me a broken reply.", "tools": [SEARCH]}
    response = scripted.ask(**asked)
    assert response.choices[0].finish_reason == "stop"
    assert response.choices[0].message.content == "<tool>\nsearch Kenya\n</tool>"
    assert content_of(parts(scripted.ask(**asked, stream=True))) == "<tool>\nsearch Kenya\n</tool>"


def test_calls_stream_as_one_delta(scripted: Running):
    chunks = parts(scripted.ask(tools=[SEARCH], stream=True))
    calls = [c.choices[0].delta.tool_calls for c in chunks if c.choices and c.choices[0].delta.tool_calls]
    assert [call.function.name for call in calls[0]] == ["search"]
    assert content_of(chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_protocol_search_hands_out_searches_and_no_other_calls(searcher: Running):
    engine = ScriptedEngine(lambda _: "<think>\nx\n</think>\n<search>\nPeru\n</search>", searcher.served.chat)
    other = {"type": "function", "function": {"name": "area", "parameters": {"type": "object", "properties": {}}}}
    for running in started(dataclasses.replace(searcher.served, engine=engine)):
        (call,) = running.ask(tools=[SEARCH]).choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("search", {"query": "Peru"})
        with pytest.raises(openai.BadRequestError, match="protocol 'search' must have one tool"):
            running.ask(tools=[other])


# ---- the policy alone ----


def test_the_bare_policy_writes_what_it_writes_in_training(tools: Running):
    rollout = played(tools.served, KENYA)
    environment = ToolEnvironment(Task(id="q", question=KENYA, answers=()), tools.served.tools)
    messages: list[Any] = [{"role": m.role, "content": m.content} for m in environment.start()]
    model = f"{tools.served.name}:raw"
    response = tools.ask(model=model, messages=messages)
    assert response.choices[0].message.content == rollout.turns[0].text
    assert response.usage.prompt_tokens == len(rollout.prompt_ids)
    chunks = parts(tools.ask(model=model, messages=messages, stream=True))
    assert content_of(chunks) == rollout.turns[0].text
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 5  # token by token
    with pytest.raises(openai.BadRequestError, match="takes text alone"):
        tools.ask(model=model, tools=[SEARCH])


@pytest.mark.parametrize("name", ["embedded", "embedded-search"])
def test_an_evaluation_through_the_endpoint_is_the_evaluation_in_process(name: str, tools: Running, searcher: Running):
    running = {"embedded": tools, "embedded-search": searcher}[name]
    endpoint = EndpointConfig(url=running.url, model=f"{running.served.name}:raw", timeout_s=120)
    asked = evaluate(name, limit=4, endpoint=endpoint)
    own = evaluate(name, limit=4)
    assert [[t.text for t in r.turns] for _, r in asked.records] == [[t.text for t in r.turns] for _, r in own.records]
    absent = {"tokens"}
    assert {**asked.metrics} == {name: value for name, value in own.metrics.items() if name not in absent}
    sampled = sum(len(turn.action_ids) for _, rollout in own.records for turn in rollout.turns)
    assert asked.endpoint["completion_tokens"] == sampled


# ---- bad requests ----


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "must hold a message of a user"),
        ({"temperature": 3}, "'temperature' must be a number from 0 to 2"),
        ({"temperature": "hot"}, "'temperature' must be"),
        ({"max_tokens": 0}, "'max_tokens' must be a whole number from 1"),
        ({"seed": 1.5}, "'seed' must be a whole number"),
        ({"n": 2}, "'n' must be 1 or left out"),
        ({"top_p": 0.5}, "'top_p' must be 1 or left out"),
        ({"stop": ["\n"]}, "'stop' must be"),
        ({"logprobs": True}, "'logprobs' must be False or left out"),
        ({"tool_choice": "required", "tools": [SEARCH]}, "'tool_choice' must be 'auto'"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"extra_body": {"beam_width": 3}}, "unrecognized request argument: 'beam_width'"),
        ({"extra_body": {"stream": "yes"}}, "'stream' must be true or false"),
    ],
)
def test_bad_requests_are_refused_in_openais_shape(tools: Running, options: dict[str, Any], says: str):
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        tools.ask(**options)
    assert caught.value.body["type"] == "invalid_request_error"  # pyright: ignore


def test_a_conversation_that_does_not_fit_says_so(tools: Running):
    with pytest.raises(openai.BadRequestError, match="must leave room for") as caught:
        tools.ask("capital " * 2000)
    assert caught.value.code == "context_length_exceeded"


def test_an_unknown_model_is_not_found_and_the_known_are_listed(tools: Running):
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist; there is embedded and embedded:raw"):
        tools.ask(model="gpt-4")
    assert [model.id for model in tools.client.models.list()] == ["embedded", "embedded:raw"]


def post(url: str, body: bytes, **headers: str) -> tuple[int, Any]:
    import urllib.error
    import urllib.request

    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_bodies_that_are_none_are_refused(tools: Running):
    url = f"{tools.url}/chat/completions"
    assert post(url, b"{")[0] == 400
    assert post(url, b"[1]")[1]["error"]["message"].startswith("the body must be a JSON object")
    assert post(url, b"[" * 100_000)[0] == 400
    assert post(url, b"{}", **{"Content-Type": "text/plain"})[0] == 415  # as a web page could send it
    assert post(url, b" " * 5_000_000)[0] == 413
    status, answer = post(f"{tools.url}/embeddings", b"{}")
    assert (status, answer["error"]["type"]) == (404, "invalid_request_error")
    assert tools.ask().choices


# ---- who may ask ----


def test_with_a_token_only_who_sends_it_is_answered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_TOKEN", "s3cret-token")
    token = token_in("MY_TOKEN")
    served = load_served("embedded")
    for running in started(served, token=token):
        assert running.ask().choices
        with OpenAI(base_url=running.url, api_key="wrong", max_retries=0) as other:
            with pytest.raises(openai.AuthenticationError, match="token must be sent"):
                other.models.list()
            with pytest.raises(openai.AuthenticationError):
                other.chat.completions.create(model="embedded", messages=[])


def test_other_machines_need_a_token_and_a_token_must_be_one(monkeypatch: pytest.MonkeyPatch):
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(ConfigError, match="host must be this machine's own"):
            listening(host, 0, token=None)
    listening("localhost", 0, token=None).close()
    monkeypatch.setenv("SHORT", "abc")
    for name in ("SHORT", "NOT_SET"):
        with pytest.raises(ConfigError, match="token-env must name a variable") as caught:
            token_in(name)
        assert "abc" not in str(caught.value)


def test_a_run_in_an_environment_from_elsewhere_is_not_served(monkeypatch: pytest.MonkeyPatch):
    played = (load_policy("embedded"), TrainConfig(environment="gym:Some-v0"))
    monkeypatch.setattr("turnwise.serving.app.run_policy", lambda run, checkpoint: played)
    with pytest.raises(ConfigError, match=r"must have tools that answer it; runs/game plays in gym:Some-v0"):
        load_served("runs/game")


def test_a_port_that_is_taken_is_one_line():
    with listening("127.0.0.1", 0, token=None) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(RunError, match=f"must be able to listen on 127.0.0.1:{port}"):
            listening("127.0.0.1", port, token=None)
    with pytest.raises(ConfigError, match="port must be between"):
        listening("127.0.0.1", 70000, token=None)


# ---- clients that go ----


def test_a_client_that_goes_frees_its_place(tools: Running):
    stream = tools.ask(model="embedded:raw", stream=True, temperature=2.0, max_tokens=900)
    next(iter(stream))
    stream.close()
    engine: Any = tools.served.engine
    for _ in range(100):
        if not engine._sessions:
            break
        threading.Event().wait(0.05)
    assert not engine._sessions
    assert tools.ask().choices


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c():
    command = [sys.executable, "-m", "turnwise.cli", "serve", "embedded", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = re.search(r"http://\S+", process.stdout.readline())
        assert url is not None
        with OpenAI(base_url=url[0], api_key="none", max_retries=5) as client:
            messages: Any = [{"role": "user", "content": KENYA}]
            with client.chat.completions.create(
                model="embedded:raw", messages=messages, temperature=2.0, max_tokens=400, stream=True, seed=0
            ) as stream:
                chunks = iter(stream)
                next(chunks)
                process.send_signal(signal.SIGINT)  # what is under way is finished
                assert list(chunks)[-1].choices[0].finish_reason in ("stop", "length")
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert out.endswith("stopped\n")


# ---- a model's own format ----


@needs_data
def test_a_models_own_format_over_its_chat_template(tools: Running):
    call = '<tool_call>\n{"name": "search", "arguments": {"query": "Kenya"}}\n</tool_call>'
    chat = published("Qwen2.5")

    def reply(prompt: str) -> str:
        return "It is <answer>Nairobi</answer>." if "<tool_response>" in prompt else f"Let me see.\n{call}"

    served = dataclasses.replace(
        tools.served,
        name="own",
        chat=chat,
        engine=ScriptedEngine(reply, chat),
        config=dataclasses.replace(tools.served.config, protocol="hermes"),
        limits=dataclasses.replace(tools.served.limits, context=8000, max_turn_tokens=300),
    )
    for running in started(served):
        answer = running.ask()
        assert answer.choices[0].message.content == "Let me see.\n\nIt is <answer>Nairobi</answer>."
        assert answer.model_extra["turnwise"]["answer"] == "Nairobi"
        assert content_of(parts(running.ask(stream=True))) == answer.choices[0].message.content
        messages: list[Any] = [{"role": "user", "content": KENYA}]
        first = running.ask(messages=messages, tools=[SEARCH]).choices[0]
        assert (first.message.content, first.finish_reason) == ("Let me see.", "tool_calls")
        (made,) = first.message.tool_calls
        messages += [first.message.model_dump(exclude_none=True)]
        messages += [{"role": "tool", "tool_call_id": made.id, "content": "Nairobi."}]
        second = running.ask(messages=messages, tools=[SEARCH]).choices[0]
        assert (second.message.content, second.finish_reason) == ("It is <answer>Nairobi</answer>.", "stop")
