"""An MCP server that answers as it should until its tool is called: `python faulty_mcp.py FAULT`."""

import json
import os
import sys
import time

FAULT = sys.argv[1]
TOOL = {"name": "look", "description": "Looks.", "inputSchema": {"type": "object", "properties": {}}}


def say(number: object, **content: object) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": number, **content}) + "\n")
    sys.stdout.flush()


def text(said: str) -> dict:
    return {"content": [{"type": "text", "text": said}]}


def called(number: object, times: int) -> None:  # noqa: C901
    """What becomes of the tool's call."""
    out = sys.stdout.buffer
    if FAULT == "hang":
        time.sleep(60)
    elif FAULT == "crash":
        os._exit(3)
    elif FAULT == "drop":
        os.close(1)
        time.sleep(60)
    elif FAULT == "flood":
        while True:
            out.write(b"x" * 65536)
    elif FAULT == "flood_of_lines":
        for _ in range(20_000):
            out.write(b"x\n")
        out.flush()
    elif FAULT == "garbage":
        out.write(bytes(range(256)) * 40 + b"\n")
        out.flush()
    elif FAULT == "deep":
        out.write(b"[" * 200_000 + b"\n")
        out.flush()
    elif FAULT == "foreign":
        say(10_000, result=text("of another call"))
    elif FAULT == "late" and times == 1:
        time.sleep(1.0)
        say(number, result=text("late"))
    elif FAULT == "shapeless":
        say(number, result={"content": [{"type": "nothing"}]})
    else:
        say(number, result=text(f"answer {times}"))


calls = 0
for line in sys.stdin:
    request = json.loads(line)
    method, number = request.get("method"), request.get("id")
    if method == "initialize":
        version = request["params"]["protocolVersion"]
        about = {"name": "faulty", "version": "1"}
        say(number, result={"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": about})
    elif method == "tools/list":
        say(number, result={"tools": [TOOL]})
    elif method == "tools/call":
        calls += 1
        called(number, calls)
    elif number is not None:
        say(number, result={})
