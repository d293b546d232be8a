"""How calls are made: threads and the lasting loop, time, limits, new tries, memory, and objects of a rollout."""

import asyncio
import copy
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from chats import CODER, template_chat
from turnwise.background import HANDED_AT_ONCE, Gate, lasting_loop
from turnwise.chat import byte_chat
from turnwise.engine import ScriptedEngine
from turnwise.env import ToolEnvironment
from turnwise.errors import ConfigError, ToolError
from turnwise.evaluation import rollout_metrics
from turnwise.judge import judge_messages
from turnwise.rewards import score
from turnwise.rollout import Limits, run_groups, run_tree
from turnwise.tool_files import load_tools
from turnwise.tool_objects import ToolSession, check_forkable, stateful
from turnwise.tools import Tool, call_tool, call_tools, pause_s, tool, tool_mapping
from turnwise.types import Action, Task, ToolCall, ToolResult, rollout_from_json

TASK = Task(id="t", question="Which?", answers=("x",), metadata={"page": "first"})
CHAT = byte_chat()
LIMITS = Limits(max_turn_tokens=200, context=100_000, max_turns=4)


def called(made: Tool, **arguments: Any) -> ToolResult:
    return asyncio.run(call_tool({made.name: made}, ToolCall(name=made.name, arguments=arguments)))


# ------------------------------------------------------------------------ threads and loop


def test_a_function_that_blocks_does_not_hold_up_the_event_loop():
    def wait(seconds: float) -> str:
        """Waits."""
        time.sleep(seconds)
        return threading.current_thread().name

    async def scene() -> tuple[ToolResult, int]:
        ticks = 0
        call = asyncio.create_task(call_tool({"wait": tool(wait)}, ToolCall(name="wait", arguments={"seconds": 0.2})))
        while not call.done():
            ticks += 1
            await asyncio.sleep(0.01)
        return call.result(), ticks

    result, ticks = asyncio.run(scene())
    assert result.text == "turnwise-tool"
    assert ticks > 2


def test_coroutines_run_on_one_loop_that_outlives_the_rollouts():
    loops = []

    async def which() -> str:
        """Which loop."""
        loops.append(asyncio.get_running_loop())
        return ""

    called(tool(which))
    called(tool(which))
    assert loops == [lasting_loop()] * 2


def test_tools_begin_while_other_rollouts_still_have_their_turn():
    began = threading.Event()

    async def look() -> str:
        """Looks."""
        began.set()
        return "x"

    async def late() -> bool:
        return began.wait(5)  # without giving the event loop back

    async def scene() -> bool:
        calls = [call_tool({"look": tool(look)}, ToolCall(name="look", arguments={})) for _ in range(HANDED_AT_ONCE)]
        results, has_begun = await asyncio.gather(asyncio.gather(*calls), late())
        assert {result.text for result in results} == {"x"}
        return has_begun

    assert asyncio.run(scene())


def test_an_inline_function_runs_where_the_event_loop_does():
    @tool(inline=True)
    def here() -> str:
        """The thread."""
        return threading.current_thread().name

    assert called(here).text == threading.current_thread().name


def test_a_decorated_function_stays_a_function():
    @tool(timeout_s=5)
    def double(x: int) -> int:
        """Twice x."""
        return 2 * x

    assert double(4) == 8
    assert double.timeout_s == 5
    assert called(double, x=4).text == "8"


# --------------------------------------------------------------------------- what goes wrong


def test_a_call_that_hangs_is_a_timeout_and_ends_nothing():
    release = threading.Event()

    @tool(timeout_s=0.1)
    def hang() -> str:
        """Hangs."""
        release.wait(30)
        return "late"

    @tool(timeout_s=0.1)
    async def stubborn() -> str:
        """Hangs, and does not let itself be cancelled."""
        for _ in range(100):
            try:
                await asyncio.sleep(0.3)
                break
            except asyncio.CancelledError:
                continue
        return "late"

    for made in (hang, stubborn):
        result = called(made)
        assert (result.error, result.text) == ("timeout", "Error: it took longer than 0.1 s")
        assert result.duration_s < 5
    release.set()


def test_every_call_has_its_own_time_though_one_timer_serves_them_all():
    release = threading.Event()

    @tool(timeout_s=0.1)
    def wait(hangs: bool) -> str:
        """Hangs, or not."""
        return "late" if hangs and release.wait(30) else "in time"

    async def scene() -> list[ToolResult]:
        async def begun(after_s: float, hangs: bool) -> ToolResult:
            await asyncio.sleep(after_s)
            return await call_tool({"wait": wait}, ToolCall(name="wait", arguments={"hangs": hangs}))

        return await asyncio.gather(begun(0, True), begun(0.03, False), begun(0.05, True), begun(0.25, True))

    results = asyncio.run(scene())
    release.set()
    assert [result.error for result in results] == ["timeout", None, "timeout", "timeout"]
    assert min(result.duration_s for result in results if result.error) > 0.09


def test_a_tools_own_timeout_error_is_a_timeout():
    def slow() -> str:
        """Slow."""
        raise TimeoutError("the page did not load")

    assert called(tool(slow)).text == "Error: the page did not load"
    assert called(tool(slow)).error == "timeout"


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("error", [SystemExit(3), ValueError("bad"), Unprintable(), RecursionError()])
def test_whatever_a_function_raises_is_an_observation(error: BaseException, inline: bool):
    def fail() -> str:
        """Fails."""
        raise error

    result = called(tool(fail, inline=inline))
    assert result.error == "exception"
    assert result.text.startswith(f"Error: {type(error).__name__}: ")


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), KeyboardInterrupt(), GeneratorExit()])
def test_whatever_a_coroutine_raises_is_an_observation_and_its_loop_lives_on(error: BaseException):
    async def fail() -> str:
        """Fails."""
        raise error

    async def fine() -> str:
        """Is fine."""
        return "fine"

    assert called(tool(fail)).error == "exception"
    assert called(tool(fine)).text == "fine"


@pytest.mark.parametrize("value", [b"bytes", object(), {1, 2}, {"a": b"bytes"}])
def test_what_is_neither_text_nor_json_is_a_bad_result(value: object):
    def give():
        """Gives it."""
        return value

    result = called(tool(give))
    assert result.error == "bad_result"
    assert result.text.startswith(f"Error: give returned {type(value).__name__}, which is neither text nor JSON")


def test_megabytes_and_lone_surrogates_are_text_that_is_cut_and_mended():
    def much() -> str:
        """Much."""
        return "word \ud800 " * 2_000_000

    result = called(tool(much, result_cap=20))
    assert (result.text, result.error) == ("word ? word ? word …", None)


# ------------------------------------------------------------- limits, new tries, memory


def test_no_more_calls_run_at_once_than_the_limit_and_all_of_them_end():
    now = most = 0

    @tool(concurrency=3)
    async def count() -> str:
        """Counts."""
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0.002)
        now -= 1
        return "done"

    calls = tuple(ToolCall(name="count", arguments={}) for _ in range(20))
    results = asyncio.run(call_tools({"count": count}, Action(tool_calls=calls)))
    assert [result.text for result in results] == ["done"] * 20
    assert most == 3


def test_who_stops_waiting_at_a_gate_takes_no_place_with_him():
    async def scene() -> None:
        gate, order = Gate(1), []

        async def pass_through(name: str) -> None:
            async with gate:
                order.append(name)

        async with gate:
            first = asyncio.create_task(pass_through("first"))
            second = asyncio.create_task(pass_through("second"))
            await asyncio.sleep(0)
            first.cancel()
            await asyncio.sleep(0)
        await second
        await pass_through("third")
        assert order == ["second", "third"]

    asyncio.run(asyncio.wait_for(scene(), 10))


def flaky(errors: list[Exception], **options: Any) -> tuple[Tool, list[int]]:
    tries: list[int] = []

    def fetch() -> str:
        """Fetches."""
        tries.append(len(tries))
        if errors:
            raise errors.pop(0)
        return "page"

    return tool(fetch, backoff_s=0.001, **options), tries


def test_what_may_succeed_is_tried_again_so_often_and_no_more():
    made, tries = flaky([ConnectionResetError(), TimeoutError()], retries=2)
    assert called(made).text == "page"
    assert len(tries) == 3
    made, tries = flaky([ConnectionResetError("gone")] * 5, retries=2)
    assert called(made).text == "Error: ConnectionResetError: gone"
    assert len(tries) == 3
    made, tries = flaky([KeyError("x")], retries=2)
    assert called(made).error == "exception"
    assert len(tries) == 1
    made, tries = flaky([KeyError("x")], retries=1, retry_on=KeyError)
    assert called(made).text == "page"


def test_a_try_that_ran_out_of_time_is_made_again():
    tries = []

    @tool(timeout_s=0.1, retries=1, backoff_s=0)
    def late() -> str:
        """Late at first."""
        tries.append(1)
        if len(tries) == 1:
            time.sleep(0.5)
        return "page"

    assert called(late).text == "page"


def test_pauses_double_up_to_a_bound():
    assert [pause_s(0.5, attempt) for attempt in (1, 2, 3, 4)] == [0.5, 1.0, 2.0, 4.0]
    assert pause_s(0.5, 100) == 30.0


def test_equal_calls_are_answered_from_memory_also_while_the_first_is_under_way():
    asked: list[str] = []

    @tool(cache=True)
    async def look(a: str, b: int = 0) -> str:
        """Looks."""
        asked.append(a)
        await asyncio.sleep(0.01)
        if a == "bad":
            raise ToolError("nothing")
        return f"{a}{b}"

    def ask(*arguments: dict) -> list[str]:
        calls = tuple(ToolCall(name="look", arguments=given) for given in arguments)
        return [result.text for result in asyncio.run(call_tools({"look": look}, Action(tool_calls=calls)))]

    assert ask({"a": "x", "b": 1}, {"b": 1, "a": "x"}, {"a": "x", "b": 2}) == ["x1", "x1", "x2"]
    assert ask({"a": "x", "b": 1}) == ["x1"]
    assert asked == ["x", "x"]
    assert ask({"a": "bad"}) == ask({"a": "bad"}) == ["Error: nothing"]
    assert asked.count("bad") == 2  # what failed is asked again


def test_where_the_first_of_equal_calls_is_cancelled_the_next_one_makes_it():
    async def scene() -> None:
        asked = []

        @tool(cache=True)
        async def look() -> str:
            """Looks."""
            asked.append(1)
            await asyncio.sleep(0.05)
            return "found"

        calls = [asyncio.create_task(call_tool({"look": look}, ToolCall(name="look", arguments={}))) for _ in range(3)]
        while not asked:
            await asyncio.sleep(0.005)
        calls[0].cancel()
        calls[1].cancel()
        assert (await calls[2]).text == "found"
        assert len(asked) == 2

    asyncio.run(asyncio.wait_for(scene(), 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_s": 0}, "timeout_s of tool 'f' must be > 0, or None; got 0"),
        ({"timeout_s": float("inf")}, "timeout_s of tool 'f' must be > 0, or None; got inf"),
        ({"concurrency": 0}, "concurrency of tool 'f' must be >= 1; got 0"),
        ({"retries": -1}, r"retries of tool 'f' must be in \[0, 100\]; got -1"),
        ({"backoff_s": -1}, "backoff_s of tool 'f' must be >= 0; got -1"),
        ({"retry_on": (BaseException,)}, "retry_on of tool 'f' must be exception classes"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str):
    def f() -> str:
        """F."""
        return ""

    with pytest.raises(ConfigError, match=message):
        tool(f, **options)
    with pytest.raises(ConfigError, match=message):
        tool(**options)(f)


# -------------------------------------------------------------------- objects of a rollout

NOTEBOOK = '''
from turnwise.tools import tool

class Notebook:
    """Lines that a rollout writes."""

    open = []

    def __init__(self, task):
        self.lines = [task.metadata["page"]]
        self.open.append(self)

    def write(self, line: str) -> int:
        """Writes a line; how many there are."""
        self.lines.append(line)
        return len(self.lines)

    @tool(timeout_s=5)
    def read(self) -> str:
        """All lines."""
        return " ".join(self.lines)

    def fork(self):
        import copy
        twin = copy.deepcopy(self)
        self.open.append(twin)
        return twin

    def close(self):
        self.open.remove(self)

    def _private(self): ...

def area(width: float, height: float) -> float:
    """Area of a rectangle."""
    return width * height

TOOLS = [Notebook, area]
'''


@pytest.fixture
def notebook(tmp_path: Path) -> dict[str, Tool]:
    file = tmp_path / "notebook_tools.py"
    file.write_text(NOTEBOOK)
    return load_tools(file)


def message(name: str, **arguments: Any) -> str:
    return f"<tool>{json.dumps({'name': name, 'args': arguments})}</tool>"


def open_notebooks(tools: dict[str, Tool]) -> list[Any]:
    return tools["write"].owner.open  # pyright: ignore[reportFunctionMemberAccess, reportOptionalMemberAccess]


def test_a_classs_public_methods_are_tools_without_self(notebook: dict[str, Tool]):
    assert list(notebook) == ["write", "read", "area"]
    assert notebook["write"].parameters["required"] == ["line"]
    assert (notebook["read"].timeout_s, notebook["area"].owner) == (5, None)


def test_each_rollout_has_its_own_object_which_is_closed_at_its_end(notebook: dict[str, Tool]):
    replies = [message("write", line="a"), message("write", line="b"), message("read"), "<answer>x</answer>"]
    made = lambda task: ToolEnvironment(task, notebook, max_turns=4)  # noqa: E731
    (group,) = asyncio.run(run_groups([TASK], made, ScriptedEngine(replies, CHAT), CHAT, group_size=5, limits=LIMITS))
    for rollout in group:
        assert [turn.result.text for turn in rollout.turns if turn.result] == ["2", "3", "first a b"]
    assert open_notebooks(notebook) == []


def test_objects_are_closed_where_the_engine_fails(notebook: dict[str, Tool]):
    made = lambda task: ToolEnvironment(task, notebook, max_turns=4)  # noqa: E731
    engine = ScriptedEngine([message("read")], CHAT)  # it has no second reply
    with pytest.raises(Exception, match="must have a reply"):
        asyncio.run(run_groups([TASK], made, engine, CHAT, group_size=3, limits=LIMITS))
    assert open_notebooks(notebook) == []


def test_calls_of_one_turn_on_one_object_come_one_after_the_other(notebook: dict[str, Tool]):
    async def scene() -> list[str]:
        session = ToolSession(notebook, TASK)
        calls = [ToolCall(name="write", arguments={"line": str(i)}) for i in range(8)]
        results = await call_tools(await session.tools(), Action(tool_calls=tuple(calls)))
        await session.close()
        await session.close()
        return [result.text for result in results]

    assert asyncio.run(scene()) == [str(n) for n in range(2, 10)]


def test_branches_go_on_with_copies_of_the_object_as_it_stood(notebook: dict[str, Tool]):
    replies = [message("write", line="a"), message("read"), "<answer>x</answer>"]
    leaves = asyncio.run(
        run_tree(
            TASK,
            ToolEnvironment(TASK, notebook, max_turns=4),
            ScriptedEngine(replies, CHAT),
            CHAT,
            branches=(1, 3),
            limits=LIMITS,
        )
    )
    assert [leaf.turns[1].result.text for leaf in leaves if leaf.turns[1].result] == ["first a"] * 3
    assert open_notebooks(notebook) == []


def test_a_copy_does_not_see_what_its_original_does_later(notebook: dict[str, Tool]):
    async def scene() -> list[str]:
        one = ToolEnvironment(TASK, notebook, max_turns=9)
        await one.step(message("write", line="a"))
        two = one.fork()
        await one.step(message("write", line="b"))
        steps = [await env.step(message("read")) for env in (one, two)]
        return [step.result.text for step in steps if step.result]

    assert asyncio.run(scene()) == ["first a b", "first a"]


class Browser:
    fork = None

    def visit(self, url: str) -> str:
        """Visits a page."""
        return url


def make_browser() -> Browser:
    return Browser()


def make_broken() -> Browser:
    raise OSError("no display")


def test_a_factory_says_which_class_it_makes_and_what_cannot_be_copied_is_refused_early():
    (visit,) = stateful(make_browser)
    for made in (visit, *stateful(Browser)):
        with pytest.raises(
            ConfigError, match="branches must go with tools that can be copied; Browser, which has 'visit'"
        ):
            check_forkable({"visit": made})
    with pytest.raises(ConfigError, match="must say which class it returns"):
        stateful(lambda: Browser())
    check_forkable(tool_mapping(stateful(Plain)))


class Plain:
    def look(self) -> str:
        """Looks."""
        return ""

    async def close(self) -> None:
        raise RuntimeError("stuck")


def test_an_object_that_cannot_be_made_ends_its_rollout_with_the_reason():
    tools = tool_mapping(stateful(make_broken))
    engine = ScriptedEngine([message("visit", url="x")], CHAT)
    made = lambda task: ToolEnvironment(task, tools)  # noqa: E731
    ((rollout,),) = asyncio.run(run_groups([TASK], made, engine, CHAT, group_size=1, limits=LIMITS))
    assert (rollout.stop, rollout.error) == ("error", "ToolError: make_broken could not be made: OSError: no display")


def test_an_object_that_cannot_be_closed_is_warned_of():
    async def scene() -> None:
        session = ToolSession(tool_mapping(stateful(Plain)))
        await session.tools()
        await session.close()

    with pytest.warns(UserWarning, match="Plain was not closed: RuntimeError: stuck"):
        asyncio.run(scene())


def test_methods_that_are_bound_to_an_object_of_the_module_are_plain_tools(tmp_path: Path):
    (tmp_path / "t.py").write_text(
        "class Book:\n"
        "    def __init__(self): self.pages = ['a', 'b']\n"
        "    def page(self, number: int) -> str:\n        'A page.'\n        return self.pages[number]\n"
        "    @staticmethod\n    def last(pages: int) -> int:\n        'The last page.'\n        return pages - 1\n"
        "TOOLS = [Book().page, Book.last]\n"
    )
    tools = load_tools(tmp_path / "t.py")
    assert called(tools["page"], number=1).text == "b"
    assert called(tools["last"], pages=3).text == "2"


def test_a_method_is_not_called_without_its_object():
    with pytest.raises(ConfigError, match="'visit' must be bound to its object"):
        called(stateful(Browser)[0], url="x")


def test_no_object_is_made_for_rollouts_that_call_nothing(notebook: dict[str, Tool]):
    environment = ToolEnvironment(TASK, notebook)
    environment.start()
    copy.copy(environment)
    asyncio.run(environment.step("<answer>x</answer>"))
    assert open_notebooks(notebook) == []


def test_calls_of_one_native_message_run_at_once_and_are_framed_paid_recorded_and_judged_in_their_order():
    come: list[int] = []

    @tool(timeout_s=30)
    async def meet(number: int) -> dict[str, int]:
        """Waits until three calls have come."""
        come.append(number)
        while len(come) < 3:
            await asyncio.sleep(0.01)
        return {"met": number}

    def call(name: str, number: object) -> str:
        return (
            f"<tool_call>\n<function={name}>\n<parameter=number>\n{number}\n</parameter>\n</function>\n</tool_call>\n"
        )

    task = Task(id="t", question="Who?", answers=("2",))
    chat = template_chat(CODER)
    said = [call("meet", 3) + call("meet", "two") + call("meet", 2) + call("met", 1) + call("meet", 1), "2"]
    (group,) = asyncio.run(
        run_groups(
            [task],
            lambda task: ToolEnvironment(task, {"meet": meet}, protocol="qwen3-coder"),
            ScriptedEngine(said, chat),
            chat,
            group_size=1,
            limits=Limits(max_turn_tokens=700, context=5000, max_turns=2),
        )
    )
    rollout = score(task, group[0], protocol="qwen3-coder")
    turn = rollout.turns[0]
    texts = [result.text for result in turn.results]
    assert sorted(come) == [1, 2, 3]  # none of the three could end before all had begun
    assert [result.error for result in turn.results] == [None, "bad_arguments", None, "unknown_tool", None]
    assert [texts[0], texts[2], texts[4]] == ['{"met": 3}', '{"met": 2}', '{"met": 1}']
    reply = chat.decode(turn.reply_ids)
    assert [reply.index(text) for text in texts] == sorted(reply.index(text) for text in texts)
    assert dict(rollout.turn_rewards[0]) == {"tool_execution": 0.0, "answer_in_results": 0.5}  # not all ran; one had it
    assert rollout_metrics(task, rollout, "qwen3-coder")["well_called"] == 3 / 5
    assert rollout_from_json(rollout.to_json()) == rollout
    seen = judge_messages("turn", "Score.", task, rollout)[-1]["content"]
    assert all(f'met\\": {number}' in seen for number in (3, 2, 1))


def test_a_thousand_rollouts_wait_for_their_tools_at_the_same_time():
    now = most = 0

    @tool(timeout_s=30)
    async def meet() -> str:
        """Waits until all have come."""
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        while most < 1000:
            await asyncio.sleep(0.01)
        now -= 1
        return "met"

    replies = [message("meet"), "<answer>x</answer>"]
    made = lambda task: ToolEnvironment(task, {"meet": meet})  # noqa: E731
    engine = ScriptedEngine(replies, CHAT)
    (group,) = asyncio.run(run_groups([TASK], made, engine, CHAT, group_size=1000, limits=LIMITS))
    assert {rollout.turns[0].result.text for rollout in group if rollout.turns[0].result} == {"met"}
    assert most == 1000
