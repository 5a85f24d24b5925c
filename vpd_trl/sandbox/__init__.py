from .cases import CallTest, CheckTest, CodeTests, StdinTest, parse_tests
from .compare import same_text, same_value
from .isolation import SandboxUnavailable
from .outcome import CaseResult, Outcome, Status
from .run import Limits, Sandbox
from .runner import CodeRunner


__all__ = [
    "CallTest",
    "CaseResult",
    "CheckTest",
    "CodeRunner",
    "CodeTests",
    "Limits",
    "Outcome",
    "Sandbox",
    "SandboxUnavailable",
    "Status",
    "StdinTest",
    "parse_tests",
    "same_text",
    "same_value",
]
