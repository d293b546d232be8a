"""What our HTTP servers and clients have in common: who may ask, and how much of an answer is read."""

import functools
import hmac
import http.client
import ipaddress
import os
import time

from turnwise.errors import ConfigError

MAX_ANSWER_BYTES = 4_000_000
"""Most bytes that are read of any server's answer."""


def whole_body(response: http.client.HTTPResponse, deadline: float, *, most: int = MAX_ANSWER_BYTES) -> bytes:
    """A response's body; TimeoutError where it is not there at `deadline` (of `time.monotonic`).

    Raises OSError where it is larger than `most`, which is not read, or breaks off.
    """
    parts, size = [], 0
    for part in iter(functools.partial(response.read1, 65536), b""):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("the answer came too slowly")
        if size > most:
            raise OSError(f"the answer is larger than {most} bytes")
    if response.length:
        raise OSError("the answer broke off")
    return b"".join(parts)


def check_host(host: str, token: str | None) -> None:
    """ConfigError where other machines could ask without a token."""
    if not token and not is_loopback(host):
        raise ConfigError(
            f"host must be this machine's own, such as 127.0.0.1, where there is no token; got {host!r}; name the "
            "variable of a token with --token-env"
        )


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_in(variable: str | None) -> str | None:
    """The token in an environment variable. ConfigError, without it, where there is none that can be sent."""
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if len(token) < 8 or not all("!" <= character <= "~" for character in token):
        raise ConfigError(
            f"token-env must name a variable with a token of at least 8 printable ASCII characters; {variable} holds "
            "none; set it"
        )
    return token


def has_token(authorization: str | None, token: str | None) -> bool:
    """Whether a request's header `Authorization` bears the token; always where there is none."""
    kind, _, sent = (authorization or "").partition(" ")
    if not token:
        return True
    return kind.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), token.encode())
