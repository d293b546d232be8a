"""The embedded world: real facts as short articles to search, and questions about them."""

from turnwise.atlas.rules import check
from turnwise.atlas.world import SPLITS, Entity, Kind, Relation, Split, World, entities, kinds
from turnwise.atlas.writing import Article, Phrasing, article_id, article_text, articles, tasks

__all__ = [
    "SPLITS",
    "Article",
    "Entity",
    "Kind",
    "Phrasing",
    "Relation",
    "Split",
    "World",
    "article_id",
    "article_text",
    "articles",
    "check",
    "entities",
    "kinds",
    "tasks",
]
