"""How long many rollouts wait for their tools: 1,000 at once, each with a chain of calls of 50 ms.

    python benchmarks/tools.py [--rollouts 1000] [--calls 1 2 4 8] [--latency-ms 50]

The scripted engine answers at once, so the time is that of the tools and of this library. The ratio is the whole time
over that of the longest chain of calls, which no number of rollouts can undercut; the CPU ratio is the processor's time
over it, which is what a busy machine cannot blur. Each rollout has 1 to `calls` calls, as many of each length, or all
have the most with --even.
"""

import argparse
import asyncio
import resource
import time

from turnwise.chat import byte_chat
from turnwise.cli import own_process
from turnwise.engine import ScriptedEngine
from turnwise.env import ToolEnvironment
from turnwise.rollout import Limits, run_rollout
from turnwise.tools import Tool, tool, tool_mapping
from turnwise.types import Rollout, Task

CALL = '<tool>{"name": "look", "args": {"what": "x"}}</tool>'


def tools_of(kind: str, latency_s: float) -> dict[str, Tool]:
    """A tool of a latency, as a coroutine function or as a plain function that blocks its thread."""

    async def look(what: str) -> str:
        """Looks something up."""
        await asyncio.sleep(latency_s)
        return what

    def look_blocking(what: str) -> str:
        """Looks something up."""
        time.sleep(latency_s)
        return what

    look_blocking.__name__ = "look"
    return tool_mapping([tool(look if kind == "async" else look_blocking)])


async def played(tools: dict[str, Tool], lengths: list[int]) -> list[Rollout]:
    """A rollout of each length, all at once."""
    chat = byte_chat()
    longest = max(lengths)
    engines = {n: ScriptedEngine([CALL] * n + ["<answer>x</answer>"], chat) for n in set(lengths)}
    limits = Limits(max_turn_tokens=100, context=1_000_000, max_turns=longest + 1)
    task = Task(id="t", question="?", answers=("x",))
    jobs = (
        run_rollout(task, ToolEnvironment(task, tools, max_turns=longest + 1), engines[n], chat, limits=limits)
        for n in lengths
    )
    return await asyncio.gather(*jobs)


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=1000)
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--latency-ms", type=float, default=50.0)
    parser.add_argument("--even", action="store_true", help="every rollout has the longest chain")
    options = parser.parse_args()
    own_process()  # as the command line does
    latency_s = options.latency_ms / 1000
    print("tool    calls  rollouts  chain, s  seconds  ratio  CPU, s  CPU ratio  CPU per call, ms")
    for kind in ("async", "thread"):
        tools = tools_of(kind, latency_s)
        asyncio.run(played(tools, [1] * 10))  # starts the loop
        for calls in options.calls:
            lengths = [calls if options.even else 1 + i % calls for i in range(options.rollouts)]
            before, start = cpu_s(), time.perf_counter()
            rollouts = asyncio.run(played(tools, lengths))
            took, used = time.perf_counter() - start, cpu_s() - before
            assert all(rollout.answer == "x" for rollout in rollouts)
            chain = calls * latency_s
            each = 1000 * used / sum(lengths)
            head = f"{kind:7} {calls:5}  {options.rollouts:8}  {chain:8.2f}  {took:7.2f}  {took / chain:5.2f}"
            print(f"{head}  {used:6.2f}  {used / chain:9.2f}  {each:16.3f}")


if __name__ == "__main__":
    main()
