"""AsyncClient: Client's methods as coroutines.

The event loop watches the link's descriptors itself, which is faster than a ZeroMQ socket made for asyncio
(each await there goes through several callbacks). It does not take the fast lane: what that saves is less
than a turn of the event loop costs, and many requests in flight gain nothing by it. Belongs to one event
loop at a time: used from another, it connects anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any

from edged.arrays import Array
from edged.clientwire import (
    ADMIN_SOCKET,
    EVENTS_SOCKET,
    INFER_SOCKET,
    InferPlan,
    InferResult,
    Request,
    answer,
    by_name,
    knows_region,
    metadata_fields,
    needs_metadata,
    question,
    read_infer,
    timeout_seconds,
    typed_inputs,
)
from edged.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from edged.exchange import LinkState, Pending, timeout_us
from edged.lease import Buffer, Lease, Leases
from edged.link import FULL_POLL_S, RETURN_POLL_S, RETURN_S_MAX, EventLink, Link, find_socket

__all__ = ["AsyncClient", "AsyncEventStream"]

_Prepare = Callable[[Link], Coroutine[Any, Any, Request]]
"""Makes the request for one link; made anew for the next."""


class AsyncClient:
    """Asks one edged daemon from asyncio; arguments, results and errors are Client's.

    Any number of coroutines may use it at once. A cancelled coroutine withdraws its request.
    """

    def __init__(self, endpoint: str | None = None, *, timeout: float = 30.0) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_seconds(timeout)
        self._links: dict[str, _LoopLink] = {}
        self._leases = Leases()
        self._plan = functools.partial(InferPlan, locate=self._leases.locate)
        self._connecting: dict[str, asyncio.Task[_LoopLink]] = {}
        self._closed = False

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Any] | Any,
        *,
        version: str | int | None = None,
        outputs: Sequence[str] | None = None,
        out: Mapping[str, Array] | None = None,
        timeout: float | None = None,
        priority: int = 0,
        decode_strings: bool = True,
    ) -> InferResult:
        """Runs `model` on `inputs`; as Client.infer."""
        timeout_s = self._timeout_s if timeout is None else timeout_seconds(timeout)
        until = time.monotonic() + timeout_s
        inputs = by_name(inputs)
        if needs_metadata(inputs):
            told = await self.model_metadata(model, version, properties=False, timeout=timeout_s)
            inputs = typed_inputs(inputs, told)
        plan = self._plan(model, inputs, version=version, outputs=outputs, priority=priority, out=out)

        async def prepare(link: Link) -> Request:
            self._leases.check(plan.memories)
            buffer = await self._buffer(link.path, plan.shared_bytes, until) if plan.shared_bytes else None
            return plan.request() if buffer is None else plan.request(buffer.memory, buffer.release)

        header, frames = await self._exchange(INFER_SOCKET, prepare, until, resend=True)
        if not knows_region(header):
            # Another daemon than the one that lent the buffer: once more, without. The app's leases are lost.
            self._leases.reset()
            plan.shared_bytes = 0
            header, frames = await self._exchange(INFER_SOCKET, prepare, until, resend=True)
        return read_infer(header, frames, plan.places, decode_strings=decode_strings)

    def submit(
        self,
        model: str,
        inputs: Mapping[str, Any] | Any,
        *,
        version: str | int | None = None,
        outputs: Sequence[str] | None = None,
        out: Mapping[str, Array] | None = None,
        timeout: float | None = None,
        priority: int = 0,
        decode_strings: bool = True,
    ) -> asyncio.Task[InferResult]:
        """`infer` as a task, for several in flight; cancelling the task withdraws the request."""
        call: Coroutine[Any, Any, InferResult] = self.infer(
            model,
            inputs,
            version=version,
            outputs=outputs,
            out=out,
            timeout=timeout,
            priority=priority,
            decode_strings=decode_strings,
        )
        return asyncio.get_running_loop().create_task(call)

    async def lease(self, nbytes: int, *, timeout: float | None = None) -> Lease:
        """As Client.lease; a Lease is a plain context manager: `with await client.lease(n) as lease`."""
        until = time.monotonic() + (self._timeout_s if timeout is None else timeout_seconds(timeout))
        loop = asyncio.get_running_loop()
        link = (await self._open(loop, INFER_SOCKET, until, None)).link
        return await loop.run_in_executor(None, self._leases.lease, link.path, nbytes, until)

    async def server_live(self, *, timeout: float | None = None) -> bool:
        """Whether a daemon answers; False where none is."""
        try:
            return bool((await self._ask("server_live", timeout=timeout))["live"])
        except Unavailable:
            return False

    async def server_ready(self, *, timeout: float | None = None) -> bool:
        """Whether the daemon has settled its first scan of the models; False where none is."""
        try:
            return bool((await self._ask("server_ready", timeout=timeout))["ready"])
        except Unavailable:
            return False

    async def server_metadata(self, *, timeout: float | None = None) -> dict[str, Any]:
        """As Client.server_metadata."""
        return await self._ask("server_metadata", timeout=timeout)

    async def model_ready(
        self, name: str, version: str | int | None = None, *, timeout: float | None = None
    ) -> bool:
        """As Client.model_ready."""
        return bool((await self._ask("model_ready", name, version, timeout=timeout))["ready"])

    async def model_metadata(
        self,
        name: str,
        version: str | int | None = None,
        *,
        properties: bool = True,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """As Client.model_metadata."""
        fields = metadata_fields(properties=properties)
        return await self._ask("model_metadata", name, version, timeout=timeout, fields=fields)

    async def statistics(
        self, name: str | None = None, version: str | int | None = None, *, timeout: float | None = None
    ) -> list[dict[str, Any]]:
        """As Client.statistics."""
        return list((await self._ask("model_statistics", name, version, timeout=timeout))["model_stats"])

    async def repository_index(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """As Client.repository_index."""
        return list((await self._ask("repository_index", timeout=timeout))["models"])

    async def load(self, name: str, *, timeout: float | None = None) -> None:
        """As Client.load."""
        await self._ask("repository_model_load", name, timeout=timeout, socket=ADMIN_SOCKET)

    async def unload(self, name: str, *, timeout: float | None = None) -> None:
        """As Client.unload."""
        await self._ask("repository_model_unload", name, timeout=timeout, socket=ADMIN_SOCKET)

    async def server_status(
        self, model: str | None = None, *, timeout: float | None = None
    ) -> dict[str, Any]:
        """As Client.server_status."""
        return await self._ask("server_status", model, timeout=timeout, socket=ADMIN_SOCKET)

    async def tune(
        self,
        name: str,
        do: str = "start",
        *,
        inputs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """As Client.tune."""
        fields = {"settings": {"do": do, **settings}}
        reply = await self._ask(
            "model_tune", name, timeout=timeout, socket=ADMIN_SOCKET, fields=fields, inputs=inputs
        )
        return dict(reply["tune"])

    async def log_settings(self, level: str | None = None, *, timeout: float | None = None) -> dict[str, Any]:
        """As Client.log_settings."""
        settings = {} if level is None else {"settings": {"level": level}}
        return await self._ask("log_settings", timeout=timeout, socket=ADMIN_SOCKET, fields=settings)

    def events(self, topics: Sequence[str] = (), timeout: float | None = None) -> AsyncEventStream:
        """The daemon's events from now on, of these topics or all, as an asynchronous iterator."""
        return AsyncEventStream(EventLink(find_socket(self._endpoint, EVENTS_SOCKET), topics), timeout)

    async def close(self) -> None:
        """Ends the connections. Coroutines that wait raise Unavailable."""
        self._closed = True
        for task in self._connecting.values():
            task.cancel()
        links, self._links = self._links, {}
        for link in links.values():
            link.close()
        self._leases.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(
        self,
        method: str,
        name: str | None = None,
        version: str | int | None = None,
        *,
        timeout: float | None,
        socket: str = INFER_SOCKET,
        fields: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        until = time.monotonic() + (self._timeout_s if timeout is None else timeout_seconds(timeout))
        request = question(method, name, version, fields or {}, inputs)

        async def prepare(_: Link) -> Request:
            return request

        header, _ = await self._exchange(socket, prepare, until, resend=socket == INFER_SOCKET)
        return answer(header)

    async def _buffer(self, path: str, nbytes: int, until: float) -> Buffer | None:
        """A buffer of the pool; asking the daemon for more must not hold up the loop."""
        buffer = self._leases.take(path, nbytes, until, grow=False)
        if buffer is not None or not self._leases.may_grow():
            return buffer
        loop = asyncio.get_running_loop()
        asked = loop.run_in_executor(None, self._leases.take, path, nbytes, until)
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            asked.add_done_callback(_give_back)
            raise

    async def _exchange(
        self, socket: str, prepare: _Prepare, until: float, *, resend: bool
    ) -> tuple[dict[str, Any], Sequence[Any]]:
        """The reply's header and frames; sends once more after a lost connection, if `resend`."""
        return_until: float | None = None
        while True:
            link, pending = await self._post_and_wait(socket, prepare, until, return_until)
            if pending.lost and resend and not self._closed and time.monotonic() < until:
                resend = False
                return_until = min(until, time.monotonic() + RETURN_S_MAX)
                continue
            return pending.reply(link.path), pending.frames

    async def _post_and_wait(
        self, socket: str, prepare: _Prepare, until: float, return_until: float | None
    ) -> tuple[Link, Pending]:
        loop = asyncio.get_running_loop()
        settled: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not settled.done():
                settled.set_result(None)

        pending = Pending(wake)
        posted = False
        while not posted:
            link = (await self._open(loop, socket, until, return_until)).link
            request = await prepare(link)
            try:
                while not (posted := link.post(request, pending, timeout_us(until))):
                    if link.state is not LinkState.OPEN:
                        break
                    if time.monotonic() >= until:
                        raise DeadlineExceeded(f"{link.path} takes no more requests", reason="SOCKET_FULL")
                    await asyncio.sleep(FULL_POLL_S)
            finally:
                if not posted and request.release is not None:
                    request.release(True)
        timer = loop.call_later(until - time.monotonic(), wake)
        try:
            await settled
        except asyncio.CancelledError:
            link.cancel(pending)
            raise
        finally:
            timer.cancel()
            link.forget(pending)
        return link, pending

    async def _open(
        self, loop: asyncio.AbstractEventLoop, socket: str, until: float, return_until: float | None
    ) -> _LoopLink:
        holder = self._links.get(socket)
        if holder is None or holder.loop is not loop or holder.link.state is not LinkState.OPEN:
            return await self._connected(loop, socket, until, return_until)
        return holder

    async def _connected(
        self, loop: asyncio.AbstractEventLoop, socket: str, until: float, return_until: float | None
    ) -> _LoopLink:
        """The open link; coroutines that need one at the same time wait for the same."""
        if self._closed:
            raise FailedPrecondition("the client is closed", reason="CLIENT_CLOSED")
        task = self._connecting.get(socket)
        if task is None or task.get_loop() is not loop:
            task = loop.create_task(self._connect(loop, socket, until, return_until))
            self._connecting[socket] = task
            task.add_done_callback(lambda _: self._connecting.pop(socket, None))
        return await asyncio.shield(task)

    async def _connect(
        self, loop: asyncio.AbstractEventLoop, socket: str, until: float, return_until: float | None
    ) -> _LoopLink:
        old = self._links.pop(socket, None)
        if old is not None:
            old.close()
        while True:
            try:
                holder = _LoopLink(loop, Link(find_socket(self._endpoint, socket)))
                try:
                    await holder.wait_open(until)
                except BaseException:
                    holder.close()
                    raise
            except Unavailable:
                if return_until is None or time.monotonic() >= return_until:
                    raise
                await asyncio.sleep(RETURN_POLL_S)
            else:
                self._links[socket] = holder
                return holder


class AsyncEventStream:
    """EventStream for `async for`; ends and raises as that does."""

    def __init__(self, link: EventLink, timeout_s: float | None) -> None:
        self._link = link
        self._timeout_s = timeout_s

    def __aiter__(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        return self

    async def __anext__(self) -> tuple[str, dict[str, Any]]:
        until = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        while True:
            event = self._link.take()
            if event is not None:
                return event
            remaining_s = None if until is None else until - time.monotonic()
            if remaining_s is not None and remaining_s <= 0:
                raise StopAsyncIteration
            await _readable(self._link.fds, remaining_s)

    async def close(self) -> None:
        """Ends the subscription."""
        self._link.close()

    async def __aenter__(self) -> AsyncEventStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _LoopLink:
    """A link whose descriptors an event loop watches."""

    def __init__(self, loop: asyncio.AbstractEventLoop, link: Link) -> None:
        self.loop = loop
        self.link = link
        self._watched = False

    async def wait_open(self, until: float) -> None:
        until = self.link.handshake_until(until)
        while True:
            self.link.check_open(expired=time.monotonic() >= until)
            if self.link.state is LinkState.OPEN:
                break
            await _readable(self.link.fds[1:], until - time.monotonic())
        for fd in self.link.fds:
            self.loop.add_reader(fd, self._drain)
        self._watched = True

    def close(self) -> None:
        self._unwatch()
        self.link.close()

    def _drain(self) -> None:
        self.link.drain()
        if self.link.state is LinkState.LOST:
            self._unwatch()

    def _unwatch(self) -> None:
        if self._watched and not self.loop.is_closed():
            for fd in self.link.fds:
                self.loop.remove_reader(fd)
        self._watched = False


def _give_back(taken: asyncio.Future[Buffer | None]) -> None:
    """Of a buffer that came too late for its request."""
    buffer = None if taken.cancelled() else taken.result()
    if buffer is not None:
        buffer.release(True)


async def _readable(fds: Sequence[int], timeout_s: float | None) -> None:
    """Returns when one of `fds` is readable or the time is over."""
    loop = asyncio.get_running_loop()
    woken = asyncio.Event()
    for fd in fds:
        loop.add_reader(fd, woken.set)
    try:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(woken.wait(), timeout_s)
    finally:
        for fd in fds:
            loop.remove_reader(fd)
