"""Runs a command whose output is passed on as long as its lines are bounded; started as a script, without the package.

    python bounded.py BYTES COMMAND ...

A server that writes a line without end would fill the memory of whoever reads it. Here it is ended instead. The
command has this process's stdin and stderr, and ends with it.
"""

import os
import subprocess
import sys


def main(most: str, *command: str) -> int:
    """The exit code of the command, which is ended at a line of more than so many bytes."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)
    except OSError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 127
    assert process.stdout
    os.close(0)  # its end is the command's alone to see
    unended = 0
    try:
        while part := os.read(process.stdout.fileno(), 65536):
            _, newline, tail = part.rpartition(b"\n")
            unended = len(tail) if newline else unended + len(part)
            if unended > int(most):
                print(f"a line of more than {most} bytes", file=sys.stderr)
                return 1
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(1, rest) :]
        os.close(1)  # whoever reads is told at once, also where the command lives on
        return process.wait()
    except BrokenPipeError:
        return 0
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
