from .cases import CallTest, CheckTest, CodeTests, StdinTest, parse_tests
from .isolation import SandboxUnavailable
from .outcome import CaseResult, Outcome, Status
from .run import Limits, Sandbox
