"""Groups of processes, which the files of this folder share."""

from rank_fixtures import four, groups, ranks, two

__all__ = ["four", "groups", "ranks", "two"]
