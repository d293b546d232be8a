"""Runs one command in a process that is cut off from everything else; started as a script, without the package.

    python jail.py FOLDER MEMORY_MB CPU_S DISK_MB [PLACE ...] -- COMMAND ...

Linux alone: new user, mount, process, network, IPC and host name namespaces. The command sees a file system that holds
the places, read-only, and a small writable /tmp; it has no network, not even the loopback one, sees no process but
those it starts, and has no capabilities. Where that cannot be had the exit code is `NO_ISOLATION` and stderr has the
reason, before the command has run. Without places there is no isolation: the command runs in the folder, with the
bounds alone.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys

NO_ISOLATION = 197
"""Exit code: there are no namespaces to run in."""
PROCESSES = 32
"""Most processes and threads of the command at once."""
ENVIRONMENT = {"HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}

_NEW_NS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_READONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_LOCKED = 2 | 4 | 8 | 1024 | 2048
"""Properties of a mount that another owner may have locked: they must be named again. As in statvfs."""
_DETACH = 2
_PDEATHSIG, _NO_NEW_PRIVS = 1, 38
_NOBODY = 65534


def main(folder: str, memory_mb: str, cpu_s: str, disk_mb: str, *rest: str) -> int:
    """The exit code of the command that follows `--`; the places before it are what its file system holds."""
    places, command = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    bounds = int(memory_mb), int(cpu_s), int(disk_mb)
    if not places:
        os.chdir(folder)
        limit(*bounds)
        os.execve(command[0], command, {**ENVIRONMENT, "HOME": folder, "TMPDIR": folder})
    try:
        is_root = _unshare()
    except OSError as error:
        return _refused("a process like this one must be allowed namespaces of its own", error)
    child = os.fork()
    if child:
        return _exit_code(os.waitpid(child, 0)[1])
    try:
        _forbid_namespaces()
        _move_to(folder, places, int(disk_mb))
        if is_root:
            _become_nobody()
        _prctl(_PDEATHSIG, signal.SIGKILL)  # a change of user would undo it
        _prctl(_NO_NEW_PRIVS, 1)
        limit(*bounds)
        resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))
        os.execve(command[0], command, ENVIRONMENT)
    except OSError as error:
        os._exit(_refused("its namespaces must allow a file system of its own, with an interpreter for all", error))


def limit(memory_mb: int, cpu_s: int, disk_mb: int) -> None:
    """Bounds of this process, and of each that it starts."""
    megabyte = 1 << 20
    for what, most in (
        (resource.RLIMIT_AS, memory_mb * megabyte),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, disk_mb * megabyte),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(what, (most, most))


def _unshare() -> bool:
    """Enters new namespaces, in which this process is nobody, or else root, with a nobody to become: then True.

    No number of processes bounds root, whatever it is called inside, so what root starts must become another user.
    """
    user, group = os.getuid(), os.getgid()
    told, tell = os.pipe()
    helper = 0 if user else os.fork()
    if user == 0 and helper == 0:
        os.close(tell)
        os.read(told, 1)  # it ends when the other is in its namespaces
        os._exit(_name_users(os.getppid()))
    _call("unshare", _NEW_USER | _NEW_NS | _NEW_UTS | _NEW_IPC | _NEW_PID | _NEW_NET)
    os.close(tell)
    os.close(told)
    if helper and os.waitpid(helper, 0)[1] == 0:
        return True
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{_NOBODY} {user} 1"),
        ("gid_map", f"{_NOBODY} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return False


def _name_users(process: int) -> int:
    """Lets a process in new namespaces have root and nobody, which only one outside may; 0 where it could."""
    try:
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{process}/{name}", "w") as file:
                file.write(f"0 0 1\n{_NOBODY} {_NOBODY} 1\n")
    except OSError:
        return 1
    return 0


def _forbid_namespaces() -> None:
    """Lets nothing inside make namespaces, in which it would be root once more and could mount without bounds.

    Where the system shows its settings read-only that cannot be had.
    """
    with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")


def _become_nobody() -> None:
    """Gives up root, its groups and its capabilities."""
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _move_to(folder: str, places: tuple[str, ...], disk_mb: int) -> None:
    """Makes `folder` the root of a new file system that holds `places`, devices without effect, and /tmp."""
    _mount("none", "/", flags=_REC | _PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for place in places:
        _show(place, folder + place)
    os.mkdir(folder + "/dev")
    for name in ("null", "zero", "urandom"):
        os.close(os.open(f"{folder}/dev/{name}", os.O_CREAT))
        _mount(f"/dev/{name}", f"{folder}/dev/{name}", flags=_BIND)
    os.mkdir(folder + "/tmp")
    _mount("tmpfs", folder + "/tmp", "tmpfs", _NOSUID | _NODEV, f"size={disk_mb}m,mode=777")
    os.mkdir(folder + "/old")
    _call("pivot_root", os.fsencode(folder), os.fsencode(folder + "/old"))
    os.chdir("/")
    _call("umount2", b"/old", _DETACH)
    os.rmdir("/old")
    _mount("none", "/", flags=_REMOUNT | _READONLY | _NOSUID | _NODEV | _BIND)
    os.chdir("/tmp")


def _show(place: str, where: str) -> None:
    """A folder of the system, read-only; where it is a link, the same link."""
    if os.path.islink(place):
        os.makedirs(os.path.dirname(where), exist_ok=True)
        os.symlink(os.readlink(place), where)
    elif os.path.isdir(place) and not os.path.ismount(where):
        os.makedirs(where, exist_ok=True)
        _mount(place, where, flags=_BIND | _REC)
        for mounted in _mounts_in(where):
            kept = os.statvfs(mounted).f_flag & _LOCKED
            _mount("none", mounted, flags=_BIND | _REMOUNT | _READONLY | _NOSUID | _NODEV | kept)


def _mounts_in(folder: str) -> list[str]:
    """The mount points at and below a folder."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [line.split()[4].encode().decode("unicode_escape") for line in file]
    return [point for point in points if point == folder or point.startswith(folder + "/")]


_LIBC = ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _call("mount", *texts[:3], flags, texts[3])


def _prctl(option: int, value: int) -> None:
    _call("prctl", option, value, 0, 0, 0)


def _call(name: str, *values: object) -> None:
    """A function of the C library; OSError where it fails."""
    numbers = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in values]
    if getattr(_LIBC, name)(*numbers) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _refused(must: str, error: OSError) -> int:
    print(f"{must}; got {error.strerror or error}", file=sys.stderr, flush=True)
    return NO_ISOLATION


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
