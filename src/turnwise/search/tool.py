"""The agent's search tool, over an index in this process or over a search server."""

import dataclasses
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from turnwise.errors import ConfigError, ToolUnavailable
from turnwise.search.corpus import Article, ArticleLike, article_from_record
from turnwise.search.index import SearchIndex
from turnwise.tools import Found, Tool, tool
from turnwise.web import whole_body

RESULT_CAP = 2000
"""Most characters of a search result, by default: about three passages of 100 words."""
NO_RESULTS = "No results."
_SPACE = "\n\n"
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


def search_tool(index: SearchIndex, *, k: int = 1, cap: int = RESULT_CAP) -> Tool:
    """A tool `search(query)` whose result is the `k` best articles in at most `cap` characters."""
    _check_k(k)

    def search(query: str) -> str:
        """Looks up articles by keywords and returns the best match."""
        return _found(index.search(query, k), cap)

    return tool(search, result_cap=cap, inline=True)


def remote_search_tool(
    url: str, *, k: int = 1, timeout_s: float = 10.0, cap: int = RESULT_CAP, token: str | None = None
) -> Tool:
    """The same tool over a search server: `turnwise serve-search`, or Search-R1's.

    `url` is the server's address, with or without `/retrieve`. A server that fails, is too slow or
    answers anything else than articles is no fault of the agent's: the result is `unavailable`, and its rollout fails.
    A `token` is what a server that listens elsewhere asks for.
    """
    _check_k(k)
    address = _retrieve_url(url)

    def search(query: str) -> str:
        """Looks up articles by keywords and returns the best match."""
        return _found(_retrieved(address, query, k, timeout_s, token), cap)

    return tool(search, result_cap=cap)


def hits_text(hits: Sequence[ArticleLike]) -> str:
    """Articles as the agent reads them: title and text on lines of their own, several numbered."""
    return _SPACE.join(_blocks(hits)) or NO_RESULTS


def _found(hits: Sequence[ArticleLike], cap: int) -> str:
    """What the agent reads, with the ids of the articles that begin within the cap; without, where one has no id."""
    if not all(hit.id for hit in hits):
        return hits_text(hits)
    ends = accumulate(len(block) + len(_SPACE) for block in _blocks(hits))
    seen = [hit.id for hit, start in zip(hits, (0, *ends), strict=False) if start < cap]
    return Found(hits_text(hits), seen)


def _blocks(hits: Sequence[ArticleLike]) -> list[str]:
    blocks = [f"{hit.title}\n{hit.text}" if hit.title else hit.text for hit in hits]
    return [f"{number}. {block}" for number, block in enumerate(blocks, start=1)] if len(blocks) > 1 else blocks


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"k of the search tool must be >= 1; got {k}; give the number of hits")


def _retrieve_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"a search server's URL must begin with http:// or https://; got {url!r}; "
            "write for example http://127.0.0.1:8765"
        )
    base = url.rstrip("/")
    return base if base.endswith("/retrieve") else f"{base}/retrieve"


def _retrieved(url: str, query: str, k: int, timeout_s: float, token: str | None) -> list[ArticleLike]:
    """A server's articles for a query; ToolUnavailable where it has none to give."""
    deadline = time.monotonic() + timeout_s
    body = json.dumps({"queries": [query], "topk": k, "return_scores": True}).encode()
    bearer = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **bearer})
    local = urllib.parse.urlsplit(url).hostname in _LOCAL_HOSTS
    handlers = [urllib.request.ProxyHandler({})] if local else []
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as response:
            answer = json.loads(whole_body(response, deadline))
    except urllib.error.HTTPError as error:
        error.close()
        raise ToolUnavailable(f"the search server answered with status {error.code}") from error
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ToolUnavailable(f"the search server gave no answer ({str(reason)[:200]})") from error
    return _articles(answer)


def _articles(answer: Any) -> list[ArticleLike]:
    """The articles in a retrieval server's answer to one query."""
    try:
        (entries,) = answer["result"]
        documents = [entry.get("document", entry) for entry in entries]
        return [_article(document) for document in documents]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ToolUnavailable("the search server's answer holds no list of articles") from error


def _article(document: dict[str, Any]) -> Article:
    """One article of a server's answer; its id is blank where the server gives none."""
    article = article_from_record({"id": "none", **document}, "the server's answer")
    return article if "id" in document else dataclasses.replace(article, id="")
