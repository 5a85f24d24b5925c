"""The command line: `vpd-trl train`, `evaluate`, `estimate` and `report`."""

from .main import main


__all__ = ["main"]
