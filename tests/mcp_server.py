"""A real MCP server, of the official SDK, that the tests start: `python mcp_server.py` or with a port for HTTP."""

import asyncio
import os
import sys

from pydantic import BaseModel

try:
    from mcp.server.fastmcp import FastMCP as Server
    from mcp.server.fastmcp import Image
except ImportError:  # version 2 of the SDK
    from mcp.server.mcpserver import Image
    from mcp.server.mcpserver import MCPServer as Server

port = int(sys.argv[1]) if len(sys.argv) > 1 else None
server = Server("test")
counted = 0


class Box(BaseModel):
    width: float
    unit: str = "m"


@server.tool()
def add(a: int, b: int = 1) -> int:
    """Sum of two
    numbers."""
    return a + b


@server.tool()
def doubled(box: Box) -> str:
    """Twice a box."""
    return f"{2 * box.width:g} {box.unit}"


@server.tool()
def fail() -> str:
    """Fails."""
    raise ValueError("no such page")


@server.tool()
def count() -> str:
    """How often it was called in this process, and which that is."""
    global counted
    counted += 1
    return f"{counted} {os.getpid()}"


@server.tool()
def crash() -> str:
    """Ends the server."""
    os._exit(3)


@server.tool()
async def slow(seconds: float) -> str:
    """Waits."""
    await asyncio.sleep(seconds)
    return "done"


@server.tool()
def picture() -> list:
    """A text and a picture."""
    return ["a picture:", Image(data=b"1234", format="png")]


if __name__ == "__main__":
    if port is None:
        server.run()
    elif hasattr(server, "settings") and hasattr(server.settings, "port"):
        server.settings.port, server.settings.log_level = port, "ERROR"
        server.run("streamable-http")
    else:
        server.run("streamable-http", port=port)
