"""The command line: `vpd-trl train`, `vpd-trl evaluate` and `vpd-trl report`."""

from .main import main


__all__ = ["main"]
