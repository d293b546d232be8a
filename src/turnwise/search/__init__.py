"""Search: corpora, a BM25 index over them, the agent's search tool, and a search server."""

from turnwise.search.corpus import Article, ArticleLike, load_corpus
from turnwise.search.index import Hit, SearchIndex, default_cache, open_index
from turnwise.search.server import search_server, serve_search
from turnwise.search.tool import hits_text, remote_search_tool, search_tool

__all__ = [
    "Article",
    "ArticleLike",
    "Hit",
    "SearchIndex",
    "default_cache",
    "hits_text",
    "load_corpus",
    "open_index",
    "remote_search_tool",
    "search_server",
    "search_tool",
    "serve_search",
]
