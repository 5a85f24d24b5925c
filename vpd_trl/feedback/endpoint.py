"""Many requests to a chat endpoint at once, of which no one can lose the others."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from huggingface_hub.errors import HfHubHTTPError, HTTPError


# Request timeout, conflict with a request under way, too early, too many requests; servers' own faults are from 500 up
_TRANSIENT_STATUS = (408, 409, 425, 429)
_LONGEST_MESSAGE = 400  # characters of an error's text: some servers answer with a whole page


class BadReply(Exception):
    """A reply that arrived, but holds nothing to use. Its first argument names the kind, the second says more."""


class Failure(NamedTuple):
    """
    Why a request has no reply.

    Attributes:
        kind: The same for all failures of one sort.
        text: What happened, for people.
    """

    kind: str
    text: str


@dataclass
class Reply:
    """
    What came of a request.

    Attributes:
        text: The reply's text; `None` if the request failed.
        failure: Why there is none.
        retries: How often it was sent again.
        seconds: From its first sending to the end, back-off included; `None` if its turn never came.
    """

    text: str | None = None
    failure: Failure | None = None
    retries: int = 0
    seconds: float | None = None


class ChatEndpoint:
    """
    Asks an OpenAI-compatible endpoint.

    Args:
        model: As in [`JudgeFeedback`], like all that follow.
        base_url: Where it is; `None` is the Hub's router.
        api_key: Its key.
        max_concurrency: Most requests under way at a time.
        timeout: Seconds for one request.
        max_retries: Most times that a request is sent again.
        backoff: Seconds before the first retry, doubled with each one.
        max_backoff: Longest wait before a retry.
        batch_timeout: Seconds for all requests of a call together, or `None`.
        options: More arguments of the client's `chat_completion`.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None,
        api_key: str | None,
        max_concurrency: int,
        timeout: float,
        max_retries: int,
        backoff: float,
        max_backoff: float,
        batch_timeout: float | None,
        options: dict[str, Any],
    ) -> None:
        self.model = model
        self.base_url = base_url
        self._api_key = api_key
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.backoff = backoff
        self.max_backoff = max_backoff
        self.batch_timeout = batch_timeout
        self.options = options
        # Not the global generator: jitter is drawn at the network's pace, and training must stay reproducible
        self._jitter = random.Random()

    async def ask(self, conversations: Sequence[list[dict[str, str]]], read: Callable[[Any], str]) -> list[Reply]:
        """
        Send every conversation, and return what came of each. No task is left when this ends, however it ends.

        Args:
            conversations: Lists of messages.
            read: The text of a `ChatCompletionOutput`, of which no field can be relied on. Raises [`BadReply`], or
                anything else, if it is of no use.
        """
        late = Failure("batch_timeout", f"no reply within batch_timeout ({self.batch_timeout} s)")
        replies = [Reply(failure=late) for _ in conversations]
        if not replies:
            return replies
        slots = asyncio.Semaphore(self.max_concurrency)
        # A client for each batch: it belongs to this event loop, and opening it costs little beside a model's answer
        async with await self._open() as client:
            tasks = [
                asyncio.create_task(self._request(client, slots, conversation, read, reply))
                for conversation, reply in zip(conversations, replies, strict=True)
            ]
            try:
                done, _ = await asyncio.wait(tasks, timeout=self.batch_timeout)
            finally:
                await _stop(tasks)
        for task in done:
            task.result()
        return replies

    async def _open(self) -> Any:
        from huggingface_hub import AsyncInferenceClient  # not needed by those who ask no judge

        # To a server that may be anyone's the client would send the user's Hub token if it had no key
        key = self._api_key if self.base_url is None else self._api_key or "none"
        client = AsyncInferenceClient(base_url=self.base_url, api_key=key, timeout=self.timeout)
        # It has no public way to its session, which many requests at once would each open for themselves
        session = await client._get_async_client()
        if self.base_url is None:
            return client
        # The Hub's own hooks refuse all requests in offline mode, which is to keep from the Hub, not from this server
        hooks = session.event_hooks
        kept = [hook for hook in hooks["request"] if not getattr(hook, "__module__", "").startswith("huggingface_hub")]
        session.event_hooks = {**hooks, "request": kept}
        return client

    async def _request(
        self,
        client: Any,
        slots: asyncio.Semaphore,
        conversation: list[dict[str, str]],
        read: Callable[[Any], str],
        reply: Reply,
    ) -> None:
        # A request keeps its slot while it waits to be sent again: a server that is overloaded gets less to do
        async with slots:
            start = time.perf_counter()
            try:
                while True:
                    try:
                        sent = client.chat_completion(conversation, model=self.model, **self.options)
                        # The client's own timeout is for each read: a server that trickles would never meet it
                        reply.text = read(await asyncio.wait_for(sent, self.timeout))
                        reply.failure = None
                        return
                    except Exception as error:  # a cancellation is none, and passes
                        wait = self._wait(error, reply.retries)
                        if wait is None:
                            reply.failure = self._failure(error)
                            return
                    await asyncio.sleep(wait)
                    reply.retries += 1
            finally:
                reply.seconds = time.perf_counter() - start

    def _wait(self, error: Exception, retries: int) -> float | None:
        """Seconds to wait before the request is sent again; `None` if it is not to be."""
        response = _response(error)
        if response is not None:
            transient = response.status_code in _TRANSIENT_STATUS or response.status_code >= 500
        else:
            transient = _is_timeout(error) or isinstance(error, HTTPError)
        if not transient or retries >= self.max_retries:
            return None
        wait = min(self.backoff * 2**retries, self.max_backoff) * self._jitter.uniform(0.5, 1.0)
        asked = 0.0 if response is None else _retry_after(response)
        # Sooner than the server asks for would be refused again; later than max_backoff holds up the training
        return None if asked > self.max_backoff else max(wait, asked)

    def _failure(self, error: Exception) -> Failure:
        response = _response(error)
        if isinstance(error, BadReply):
            kind, text = error.args
        elif response is not None:
            kind, text = f"HTTP {response.status_code}", str(error)
        elif _is_timeout(error):
            kind, text = "timeout", f"no reply within {self.timeout} s"
        elif isinstance(error, HTTPError):
            kind, text = type(error).__name__, str(error)
        else:
            kind, text = "unreadable reply", f"{type(error).__name__}: {error}"
        if self._api_key:  # servers quote what they were sent
            text = text.replace(self._api_key, "***")
        return Failure(kind, " ".join(text.split())[:_LONGEST_MESSAGE])


async def _stop(tasks: list[asyncio.Task]) -> None:
    """Cancel what still runs, until nothing does: `wait_for` can lose a cancellation that meets an error."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.1)


def _response(error: BaseException | None) -> Any:
    """The server's response behind an error, also where the client stumbled over what stood in it."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) or type(error).__name__ == "HTTPStatusError":
            return error.response  # type: ignore[attr-defined]
        error = error.__context__
    return None


def _is_timeout(error: Exception) -> bool:
    # Until Python 3.11 asyncio's is a class of its own
    return isinstance(error, (TimeoutError, asyncio.TimeoutError))


def _retry_after(response: Any) -> float:
    """Seconds that a server asks to wait, which it can give as a number or as a date; 0 if it doesn't."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
