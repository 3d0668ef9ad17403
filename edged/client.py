"""Client: how an app asks the daemon. `asyncclient` has the same for event loops.

Both are shells around the same parts: `clientwire` says what is sent and what a reply means, `link` is one
connection, `lease` the memory shared with the daemon. What is decided here is when: deadlines, connecting
anew after the daemon restarted, and sending what has no side effects once more when its connection was lost.

A Client may be used by any number of threads at once, and survives a fork: the child connects anew.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from edged.arrays import Array
from edged.clientwire import (
    ADMIN_SOCKET,
    EVENTS_SOCKET,
    INFER_SOCKET,
    InferPlan,
    InferResult,
    Place,
    Recipe,
    Request,
    answer,
    by_name,
    knows_region,
    metadata_fields,
    needs_metadata,
    question,
    read_infer,
    suit_recipe,
    timeout_seconds,
    typed_inputs,
)
from edged.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from edged.exchange import Exchange, LinkState, Pending, timeout_us
from edged.lanelink import LANE_RETRY_S, LANE_SOCKET, LaneLink, NotByLane, Scope, raise_if_refused
from edged.lease import Lease, Leases
from edged.link import FULL_POLL_S, RETURN_POLL_S, RETURN_S_MAX, EventLink, Link, find_socket

__all__ = ["Client", "EventStream", "InferResult", "PendingResult"]

_RECIPES_MAX = 8
"""Forms of requests for one model that a client keeps in mind, the newest first; an app has one or two."""

_RECIPE_MODELS_MAX = 64
"""Models for which it keeps them. Then it begins anew."""

_LARGE_MODELS_MAX = 256
"""Models whose answers did not fit into a packet; then all are tried again."""

_What = Request | Callable[[Exchange], Request]
"""What is sent, or what makes it for one link and anew for the next."""


class PendingResult:
    """An inference in flight, from `Client.submit`."""

    def __init__(
        self,
        link: Exchange,
        pending: Pending,
        until: float,
        places: Mapping[str, Place],
        leases: Leases,
        *,
        decode_strings: bool = True,
    ) -> None:
        self._link = link
        self._pending = pending
        self._until = until
        self._places = places
        self._leases = leases
        self._decode_strings = decode_strings

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""
        self._link.drain()
        return self._pending.settled or time.monotonic() >= self._until

    def result(self, timeout: float | None = None) -> InferResult:
        """Waits for the answer, `timeout` seconds at most, and at most until the request's own deadline.

        Raises the daemon's typed error; DeadlineExceeded when the request's time is over; TimeoutError
        when only `timeout` is: then it is still in flight, and can be asked for again.
        """
        until = self._until if timeout is None else min(self._until, time.monotonic() + timeout)
        if not self._link.wait(self._pending, until):
            if until < self._until:
                raise TimeoutError(f"no answer within {timeout} s; the request is still in flight")
            self._link.forget(self._pending)
        header = self._pending.reply(self._link.path)
        if not knows_region(header):
            self._leases.reset()
        return read_infer(header, self._pending.frames, self._places, decode_strings=self._decode_strings)

    def cancel(self) -> None:
        """Asks the daemon to withdraw the request; `result` then raises Cancelled, unless it was too late."""
        self._link.cancel(self._pending)


class Client:
    """Asks one edged daemon; see the module's text on threads, forks and restarts.

    `endpoint` is `ipc:///DIR/edged.sock`; left out, `EDGED_ENDPOINT`, then the user's own daemon, then the
    system's. Nothing is connected before the first call. `timeout` is each call's time in seconds, unless
    the call says otherwise. Every call raises Unavailable with reason DAEMON_NOT_RUNNING when no daemon is
    there, and DeadlineExceeded when its time is over; a reply that comes later is dropped.

    `infer` goes over the daemon's fast lane where its tensors fit into a packet of 64 KiB, in which arrays in
    leases do not count, else over ZeroMQ. Nothing else about it differs. `fast=False` has all go over ZeroMQ.
    """

    def __init__(self, endpoint: str | None = None, *, timeout: float = 30.0, fast: bool = True) -> None:
        self._endpoint = endpoint
        self._timeout_s = timeout_seconds(timeout)
        self._fast = fast
        self._no_lane_before = 0.0
        self._large_models: set[str] = set()
        self._recipes: dict[str, tuple[Recipe, ...]] = {}
        self._links: dict[str, Exchange] = {}
        self._leases = Leases()
        self._plan = functools.partial(InferPlan, locate=self._leases.locate)
        self._connecting = threading.Lock()
        self._closed = False

    def infer(
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
        """Runs `model` on `inputs` and returns its outputs.

        `inputs` maps names to arrays; for a model of one input the array alone will do, or what numpy makes
        one of. Arrays are sent with the dtype they have, never another; lists and Python scalars, which have
        none, as the model declares (one more question to the daemon); strings as BYTES. `outputs` names those
        wanted, None is all. `priority` is 1 (highest) to 9. Large arrays are sent from where they lie: leave
        them alone until this returns. Strings in the outputs are str; `decode_strings=False` gives them as
        bytes, which is for strings that are not UTF-8: one of those raises InvalidArgument otherwise.

        An array that lies in a lease (see `lease`) is not sent at all: the daemon reads it there. `out` maps
        names of outputs to arrays in leases for them to land in: the result then has views of those, with the
        outputs' real shapes. Without `outputs`, those in `out` are all that is returned. When this raises
        DeadlineExceeded or Cancelled the run may still write to them: take another lease then.
        """
        timeout_s = self._timeout_s if timeout is None else timeout_seconds(timeout)
        until = time.monotonic() + timeout_s
        inputs = by_name(inputs)
        if out is None:
            request = self._by_recipe(model, inputs, version, outputs, priority)
            if request is not None:
                header, frames = self._infer(model, request, until, by_lane=self._fast)
                return read_infer(header, frames, decode_strings=decode_strings)
        if needs_metadata(inputs):
            inputs = typed_inputs(inputs, self._tensors(model, version, timeout_s))
        plan = self._plan(model, inputs, version=version, outputs=outputs, priority=priority, out=out)
        prepare = self._preparing(plan, until)
        by_lane = self._fast and not plan.needs_frames
        header, frames = self._infer(model, prepare, until, by_lane=by_lane)
        if not knows_region(header):
            # Another daemon than the one that lent the buffer: once more, without. The app's leases are lost.
            self._leases.reset()
            plan.shared_bytes = 0
            header, frames = self._infer(model, prepare, until, by_lane=by_lane)
        return read_infer(header, frames, plan.places, decode_strings=decode_strings)

    def _by_recipe(
        self,
        model: str,
        inputs: Mapping[str, Any],
        version: str | int | None,
        outputs: Sequence[str] | None,
        priority: int,
    ) -> Request | None:
        """The request if it is made of small arrays, by the recipe of one like it that went before."""
        wanted = None if outputs is None else list(outputs)
        known = self._recipes.get(model, ())
        for recipe in known:
            request = recipe.request(inputs, version, wanted, priority)
            if request is not None:
                return request
        if not suit_recipe(inputs):
            return None
        if len(self._recipes) >= _RECIPE_MODELS_MAX:
            self._recipes = {}
        recipe = Recipe(model, inputs, version=version, outputs=wanted, priority=priority)
        self._recipes[model] = (recipe, *known[: _RECIPES_MAX - 1])
        return recipe.request(inputs, version, wanted, priority)

    def _infer(
        self, model: str, what: _What, until: float, *, by_lane: bool
    ) -> tuple[dict[str, Any], Sequence[Any]]:
        """Over the fast lane if that can be, else over ZeroMQ."""
        if by_lane and model not in self._large_models and time.monotonic() >= self._no_lane_before:
            try:
                reply = self._exchange(LANE_SOCKET, what, until, resend=True)
                if "error" in reply[0]:
                    raise_if_refused(reply[0])
                return reply
            except NotByLane as e:
                if e.scope is Scope.DAEMON:
                    self._no_lane_before = time.monotonic() + LANE_RETRY_S
                elif e.scope is Scope.MODEL:
                    known = self._large_models
                    self._large_models = {model} if len(known) >= _LARGE_MODELS_MAX else known | {model}
        return self._exchange(INFER_SOCKET, what, until, resend=True)

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
    ) -> PendingResult:
        """Like `infer`, but returns at once; for several inferences in flight from one thread.

        Inputs are copied, except those that lie in a lease: leave these alone until the result is there. A
        request whose connection is lost is not sent again: `result` raises Unavailable.
        """
        timeout_s = self._timeout_s if timeout is None else timeout_seconds(timeout)
        until = time.monotonic() + timeout_s
        inputs = by_name(inputs)
        if needs_metadata(inputs):
            inputs = typed_inputs(inputs, self._tensors(model, version, timeout_s))
        plan = self._plan(model, inputs, version=version, outputs=outputs, priority=priority, out=out)
        pending = Pending()
        link = self._post(INFER_SOCKET, self._preparing(plan, until, copies=True), pending, until)
        return PendingResult(link, pending, until, plan.places, self._leases, decode_strings=decode_strings)

    def lease(self, nbytes: int, *, timeout: float | None = None) -> Lease:
        """Memory shared with the daemon, for arrays that then need not be sent; see Lease.

        An app that makes its tensors in a lease saves the copies. One that does not need not care: large
        arrays go through leases of the client's own where that is faster.
        Raises Unimplemented when the daemon has none, ResourceExhausted (LEASE_QUOTA) when this user's are
        used up.
        """
        until = time.monotonic() + (self._timeout_s if timeout is None else timeout_seconds(timeout))
        link = self._links.get(LANE_SOCKET) or self._links.get(INFER_SOCKET)
        if link is None or link.state is not LinkState.OPEN:
            link = self._connect(INFER_SOCKET, until, None)
        return self._leases.lease(link.path, nbytes, until)

    def server_live(self, *, timeout: float | None = None) -> bool:
        """Whether a daemon answers; False where none is."""
        try:
            return bool(self._ask("server_live", timeout=timeout)["live"])
        except Unavailable:
            return False

    def server_ready(self, *, timeout: float | None = None) -> bool:
        """Whether the daemon has settled its first scan of the models; False where none is."""
        try:
            return bool(self._ask("server_ready", timeout=timeout)["ready"])
        except Unavailable:
            return False

    def server_metadata(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Name, version, extensions, protocol versions, limits and `instance_id` of the daemon."""
        return self._ask("server_metadata", timeout=timeout)

    def model_ready(
        self, name: str, version: str | int | None = None, *, timeout: float | None = None
    ) -> bool:
        """Whether the model (or that version) serves. Raises NotFound for one that the folder never had."""
        return bool(self._ask("model_ready", name, version, timeout=timeout)["ready"])

    def model_metadata(
        self,
        name: str,
        version: str | int | None = None,
        *,
        properties: bool = True,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """`{name, versions, platform, inputs, outputs, properties, state}` of a model.

        `properties` is what the model says of itself, whole, up to a mebibyte. Raises ResourceExhausted
        (METADATA_TOO_LARGE) for a model that says more; with `properties=False` it is left out.
        """
        fields = metadata_fields(properties=properties)
        return self._ask("model_metadata", name, version, timeout=timeout, fields=fields)

    def _tensors(self, name: str, version: str | int | None, timeout_s: float) -> dict[str, Any]:
        return self.model_metadata(name, version, properties=False, timeout=timeout_s)

    def statistics(
        self, name: str | None = None, version: str | int | None = None, *, timeout: float | None = None
    ) -> list[dict[str, Any]]:
        """Counts and durations of one model, or of all."""
        return list(self._ask("model_statistics", name, version, timeout=timeout)["model_stats"])

    def repository_index(self, *, timeout: float | None = None) -> list[dict[str, Any]]:
        """`{name, version, state, reason}` of every model version that the daemon knows."""
        return list(self._ask("repository_index", timeout=timeout)["models"])

    def load(self, name: str, *, timeout: float | None = None) -> None:
        """Asks the daemon to look at a model again and load it (admin). Returns before it has loaded."""
        self._ask("repository_model_load", name, timeout=timeout, socket=ADMIN_SOCKET)

    def unload(self, name: str, *, timeout: float | None = None) -> None:
        """Takes a model out of service until it is loaded again or its bytes change (admin)."""
        self._ask("repository_model_unload", name, timeout=timeout, socket=ADMIN_SOCKET)

    def server_status(self, model: str | None = None, *, timeout: float | None = None) -> dict[str, Any]:
        """Everything that the daemon says about itself: devices, resources, models, workers (admin).

        With `model` also its `history`: what happened last, as the log tells it, the oldest first.
        """
        return self._ask("server_status", model, timeout=timeout, socket=ADMIN_SOCKET)

    def log_settings(self, level: str | None = None, *, timeout: float | None = None) -> dict[str, Any]:
        """The daemon's log settings, after setting `level` if one is given (admin)."""
        settings = {} if level is None else {"settings": {"level": level}}
        return self._ask("log_settings", timeout=timeout, socket=ADMIN_SOCKET, fields=settings)

    def tune(
        self,
        name: str,
        do: str = "start",
        *,
        inputs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """Has the daemon measure how it runs a model best (admin): the report so far.

        `do` is `start` (with `aim`, `latency` or `throughput`, and `budget_ms`), `status`, `cancel` or
        `apply` (each with `tune`, the report's `id`; with `unproven` set to true the report's `best_unproven`
        is applied, whose answers may differ). Without a question for 30 s it is cancelled. A start may name
        what to measure with: `inputs` as for `infer`, or `shapes` of some inputs, `{name: [dims]}`.
        """
        fields = {"settings": {"do": do, **settings}}
        reply = self._ask(
            "model_tune", name, timeout=timeout, socket=ADMIN_SOCKET, fields=fields, inputs=inputs
        )
        return dict(reply["tune"])

    def events(self, topics: Sequence[str] = (), timeout: float | None = None) -> EventStream:
        """The daemon's events from now on, of these topics or all; see EventStream."""
        return EventStream(EventLink(find_socket(self._endpoint, EVENTS_SOCKET), topics), timeout)

    def close(self) -> None:
        """Ends the connections. Calls that wait in other threads raise Unavailable."""
        self._closed = True
        with self._connecting:
            links, self._links = self._links, {}
        for link in links.values():
            link.close()
        self._leases.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # An app that forgets to close must not keep a connection of the daemon's for ever.
        with contextlib.suppress(Exception):
            self.close()

    def __repr__(self) -> str:
        links = ", ".join(map(repr, self._links.values()))
        return f"<Client {self._endpoint or 'default endpoint'}{': ' + links if links else ''}>"

    def _ask(
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
        header, _ = self._exchange(socket, request, until, resend=socket == INFER_SOCKET)
        return answer(header)

    def _preparing(
        self, plan: InferPlan, until: float, *, copies: bool = False
    ) -> Callable[[Exchange], Request]:
        """Makes the request of a plan for one link; with `copies` nothing in it is the caller's memory."""

        def prepare(link: Exchange) -> Request:
            self._leases.check(plan.memories)
            request: Request | None = None
            if plan.shared_bytes:
                buffer = self._leases.take(link.path, plan.shared_bytes, until)
                if buffer is not None:
                    request = plan.request(buffer.memory, buffer.release)
            if request is None:
                request = plan.request()
            if copies:
                request.frames = [bytes(frame) for frame in request.frames]
            return request

        return prepare

    def _exchange(
        self, socket: str, what: _What, until: float, *, resend: bool
    ) -> tuple[dict[str, Any], Sequence[Any]]:
        """The reply's header and frames; sends once more after a lost connection, if `resend`."""
        return_until: float | None = None
        while True:
            pending = Pending()
            link = self._links.get(socket)
            # The short way, if there is one: for what depends on no link.
            if not (
                isinstance(link, LaneLink) and isinstance(what, Request) and link.ask(what, pending, until)
            ):
                link = self._post(socket, what, pending, until, return_until)
                link.wait(pending, until)
            if pending.header is None:
                link.forget(pending)
                if pending.lost and resend and not self._closed and time.monotonic() < until:
                    resend = False
                    return_until = min(until, time.monotonic() + RETURN_S_MAX)
                    continue
                if pending.lost and not self._closed and isinstance(link, LaneLink) and not link.answered:
                    raise NotByLane(Scope.DAEMON)  # of several threads only the first was told that it is so
            return pending.reply(link.path), pending.frames

    def _post(
        self,
        socket: str,
        what: _What,
        pending: Pending,
        until: float,
        return_until: float | None = None,
    ) -> Exchange:
        """Sends over the open link or a new one; waits while the socket is full, or the daemon away."""
        while True:
            link = self._links.get(socket)
            if link is None or link.state is not LinkState.OPEN:
                link = self._connect(socket, until, return_until)
            request = what if isinstance(what, Request) else what(link)
            posted = False
            try:
                while not (posted := link.post(request, pending, timeout_us(until))):
                    if link.state is not LinkState.OPEN:
                        break
                    if time.monotonic() >= until:
                        raise DeadlineExceeded(f"{link.path} takes no more requests", reason="SOCKET_FULL")
                    # Looked for, not waited for: whoever waits for room would hold the link from its readers.
                    time.sleep(FULL_POLL_S)
            finally:
                if not posted and request.release is not None:
                    request.release(True)
            if posted:
                return link

    def _connect(self, socket: str, until: float, return_until: float | None) -> Exchange:
        with self._connecting:
            if self._closed:
                raise FailedPrecondition("the client is closed", reason="CLIENT_CLOSED")
            link = self._links.get(socket)
            if link is not None and link.state is LinkState.OPEN:
                return link
            if link is not None:
                del self._links[socket]
                link.close()
            while True:
                try:
                    if isinstance(link, LaneLink) and not link.answered:
                        find_socket(self._endpoint, INFER_SOCKET)
                        raise NotByLane(Scope.DAEMON)  # it was taken, and hung up on without a word
                    link = self._open(socket, until)
                except Unavailable:
                    if return_until is None or time.monotonic() >= return_until:
                        raise
                    # Nothing tells that a daemon is back but a connect(2); `return_until` bounds it.
                    time.sleep(RETURN_POLL_S)
                else:
                    self._links[socket] = link
                    return link

    def _open(self, socket: str, until: float) -> Exchange:
        if socket == LANE_SOCKET:
            return LaneLink(find_socket(self._endpoint, INFER_SOCKET))
        link = Link(find_socket(self._endpoint, socket))
        try:
            link.wait_open(until)
        except BaseException:
            link.close()
            raise
        return link


class EventStream:
    """An iterator of `(topic, event)`; also a context manager.

    It ends when no event comes for `timeout` seconds (None waits for ever), and raises Unavailable when the
    daemon goes. Each event has `seq` and `instance_id`: a gap in `seq`, or a new instance, means that events
    were missed and the index is to be read again. One thread at a time.
    """

    def __init__(self, link: EventLink, timeout_s: float | None) -> None:
        self._link = link
        self._timeout_s = timeout_s

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return self

    def __next__(self) -> tuple[str, dict[str, Any]]:
        until = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        while True:
            event = self._link.take()
            if event is not None:
                return event
            remaining_s = None if until is None else until - time.monotonic()
            if remaining_s is not None and remaining_s <= 0:
                raise StopIteration
            self._link.wait(remaining_s)

    def close(self) -> None:
        """Ends the subscription."""
        self._link.close()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()
