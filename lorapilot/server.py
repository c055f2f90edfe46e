"""The web server: daphne, made fit for large files, slow readers and open websockets.

    python -m lorapilot.server --host 127.0.0.1 --port 0

What it adds to daphne, each with a test in tests/serving/:
- An application waits while its client is slow: at most one message above Twisted's 64 KiB buffer is held for a
  connection, HTTP or websocket. Stock daphne buffers a whole 1 GiB download for a slow client.
- What goes to a websocket goes straight to the kernel, whose own buffer for it is bounded, too.
- A body over MAX_BODY_BYTES is answered with 413 as soon as that is known, chunked bodies included, and is not kept.
- Twisted's own form parser, which held 12 bytes of memory for each byte of an upload, is off: Django parses forms.
- On SIGTERM and SIGINT it takes no new connection, closes websockets with code 4012, gives requests a moment to
  finish, and exits with 0. Stock daphne crashes (SIGSEGV) when a websocket is open.
- HEAD has no body even when the application sends one in parts.

It builds on internals of daphne, Twisted and Autobahn: requirements.txt pins them, lorapilot/checks.py refuses others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
from typing import Any

from daphne.server import Server  # first: it installs the asyncio reactor  # isort: skip
from daphne.http_protocol import HTTPFactory, WebRequest
from daphne.ws_protocol import WebSocketFactory, WebSocketProtocol
from twisted.internet import defer
from twisted.internet import reactor as installed_reactor
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory
from twisted.logger import STDLibLogObserver, globalLogBeginner
from zope.interface import implementer

from lorapilot.children import die_with_parent
from lorapilot.listening import address_of, listen

reactor: Any = installed_reactor  # its interfaces are zope's, which mypy does not read

GOING_AWAY = 4012  # the websocket close code at shutdown; clients reconnect. Autobahn refuses to send 1012.
DRAIN_SECONDS = 3.0  # how long requests and websockets have to finish at shutdown
CANCEL_SECONDS = 5.0  # how long a cancelled application has after its client has left, or at shutdown
LINGER_SECONDS = 5.0  # how long we read on after a 413, so that the client gets to see it instead of a reset
READ_BYTES = 64 * 1024
MESSAGE_BYTES = 64 * 1024  # the largest websocket message a client may send; ours send small JSON
KERNEL_BYTES = 128 * 1024  # the kernel's send buffer of a websocket (it takes twice that); left alone it grows to 4 MiB
CANNOT_LISTEN = 69  # EX_UNAVAILABLE


@implementer(IPushProducer)
class Flow:
    """Open while the client takes what is sent. Twisted shuts it when its buffer is full, and opens it when empty."""

    def __init__(self) -> None:
        self._is_open = asyncio.Event()
        self._is_open.set()

    async def wait(self) -> None:
        await self._is_open.wait()

    def pauseProducing(self) -> None:  # noqa: N802 the interface's name
        self._is_open.clear()

    def resumeProducing(self) -> None:  # noqa: N802 as above
        self._is_open.set()

    def stopProducing(self) -> None:  # noqa: N802 as above; the connection is gone: nobody needs to wait
        self._is_open.set()


class Request(WebRequest):
    """One HTTP request, which may become a websocket."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.flow = Flow()
        self.is_refused = False
        self._received = 0
        super().__init__(*args, parsePOSTFormSubmission=False, **kwargs)

    def gotLength(self, length: int | None) -> None:  # noqa: N802 Twisted's name; None: a chunked body
        if (length or 0) <= self.server.max_body_bytes:
            super().gotLength(length)
            return
        super().gotLength(0)
        self.requestHeaders.removeHeader(b"Expect")  # no "100 Continue" after a refusal
        self._refuse()

    def handleContentChunk(self, data: bytes) -> None:  # noqa: N802 as above
        self._received += len(data)
        if self.is_refused:
            return
        if self._received > self.server.max_body_bytes:
            self._refuse()
        else:
            super().handleContentChunk(data)

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:  # noqa: N802 as above
        if self.is_refused:
            self.channel.loseConnection()
        else:
            super().requestReceived(command, path, version)

    def _refuse(self) -> None:
        """Answer at once, past the usual way: the request is not complete, so there is none to reply to."""
        self.is_refused = True
        self.content.close()
        accept = b",".join(self.requestHeaders.getRawHeaders(b"accept", []))
        path: bytes = self.channel._path
        self.channel.transport.write(too_large(self.server.max_body_bytes, accept, path))
        linger = reactor.callLater(LINGER_SECONDS, self.channel.transport.abortConnection)
        self.notifyFinish().addBoth(lambda _: linger.active() and linger.cancel())

    def handle_reply(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start" and self.channel is not None and self.producer is None:
            self.registerProducer(self.flow, streaming=True)
        if self.method == b"HEAD" and "body" in message:
            message = message | {"body": b""}
        super().handle_reply(message)

    def finish(self) -> None:
        if self.producer is not None:
            self.unregisterProducer()
        super().finish()

    def connectionLost(self, reason: Any) -> None:  # noqa: N802 as above
        self.flow.stopProducing()
        super().connectionLost(reason)


def too_large(limit: int, accept: bytes, path: bytes) -> bytes:
    """The whole 413 response, in the form that the client understands."""
    sentence = (
        f"The request is larger than {limit // 1024**2} MiB. Send fewer files at once, or upload large files in chunks."
    )
    if b"application/json" in accept or path.startswith(b"/api/"):
        kind, body = "application/json", json.dumps({"detail": sentence})
    else:
        kind = "text/html; charset=utf-8"
        body = f"<!doctype html><title>Too large</title><h1>Too large</h1><p>{sentence}</p>"
    head = f"HTTP/1.1 413 Content Too Large\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n{body}".encode()


class Socket(WebSocketProtocol):
    """One websocket."""

    def connectionMade(self) -> None:  # noqa: N802 Twisted's name
        super().connectionMade()
        self.flow = Flow()
        self.transport.unregisterProducer()  # the HTTP channel that it was until now
        self.transport.registerProducer(self.flow, True)
        self.transport.getHandle().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)

    def _closeConnection(self, abort: bool = False) -> None:  # noqa: N802, FBT001, FBT002 Autobahn's signature
        self.transport.unregisterProducer()  # Twisted keeps a closing connection open for a producer
        super()._closeConnection(abort)

    def connectionLost(self, reason: Any) -> None:  # noqa: N802 as above
        self.flow.stopProducing()
        super().connectionLost(reason)

    maxMessagePayloadSize: int  # noqa: N815 Autobahn's name

    def sendMessage(self, *arguments: Any, **options: Any) -> None:  # noqa: N802 Autobahn's name
        """Autobahn holds what we send to the clients' limit, too, and drops what is longer: frames of a log are."""
        if self.state != self.STATE_OPEN:
            return  # the goodbye is on its way, and the application has not heard of it yet
        limit, self.maxMessagePayloadSize = self.maxMessagePayloadSize, 0
        try:
            super().sendMessage(*arguments, **options)
        finally:
            self.maxMessagePayloadSize = limit

    def sendData(self, data: bytes, sync: bool = False, chopsize: int | None = None) -> None:  # noqa: FBT001, FBT002, N802 as above
        """At once, while the client takes it. By way of the event loop it costs two more system calls, and as much
        again in Python: half of the processor time with 500 viewers."""
        transport = self.transport
        if transport.connected and not transport.dataBuffer and not transport._tempDataLen:
            written = transport.writeSomeData(data)  # an exception when the connection is lost: `write` hears it, too
            data = data[written:] if isinstance(written, int) else data
        if data:
            transport.write(data)

    def say_going_away(self) -> None:
        if self.state == self.STATE_OPEN:
            self.serverClose(code=GOING_AWAY)
        elif self.state == self.STATE_CONNECTING:
            self.transport.abortConnection()


class RequestFactory(HTTPFactory):
    def buildProtocol(self, addr: Any) -> Any:  # noqa: N802 Twisted's name
        protocol = super().buildProtocol(addr)
        protocol.requestFactory = Request
        return protocol


class SocketFactory(WebSocketFactory):
    protocol = Socket


class PilotServer(Server):
    """Serves one ASGI application on one listening socket, until SIGTERM or SIGINT."""

    def __init__(self, application: Any, *, max_body_bytes: int) -> None:
        super().__init__(
            application,
            endpoints=["the socket that `serve` is given"],
            request_buffer_size=READ_BYTES,
            websocket_max_message_size=MESSAGE_BYTES,
            websocket_max_frame_size=MESSAGE_BYTES,
            application_close_timeout=CANCEL_SECONDS,
            server_name="",
        )
        self.max_body_bytes = max_body_bytes

    def serve(self, listening: socket.socket) -> None:
        self.connections: dict[Any, dict[str, Any]] = {}
        self.http_factory: Factory = RequestFactory(self)
        self.ws_factory = SocketFactory(self, server=None)
        self.ws_factory.setProtocolOptions(
            failByDrop=False,  # a client that breaks a rule hears which
            autoPingTimeout=self.ping_timeout,
            allowNullOrigin=True,  # lorapilot/asgi.py decides about origins
            openHandshakeTimeout=self.websocket_handshake_timeout,
            maxMessagePayloadSize=self.websocket_max_message_size,
            maxFramePayloadSize=self.websocket_max_frame_size,
        )
        twisted_log: Any = STDLibLogObserver("twisted")  # its warnings and failures, through Django's LOGGING
        globalLogBeginner.beginLoggingTo([twisted_log], redirectStandardIO=False, discardBuffer=True)
        asyncio.set_event_loop(reactor._asyncioEventloop)
        reactor.callLater(1, self.application_checker)
        reactor.callLater(2, self.timeout_checker)
        listening.setblocking(False)
        port = reactor.adoptStreamPort(listening.fileno(), listening.family, self.http_factory)
        reactor.addSystemEventTrigger(
            "before", "shutdown", lambda: defer.Deferred.fromFuture(asyncio.ensure_future(self.drain(port)))
        )
        reactor.run()

    async def handle_reply(self, protocol: Any, message: dict[str, Any]) -> None:
        """The application's `send`: it returns when the client has taken enough of what was sent before."""
        await super().handle_reply(protocol, message)
        await protocol.flow.wait()
        if self._has_left(protocol):
            await asyncio.sleep(0.05)  # one that talks on to nobody must not hold up the others until it is cancelled

    def _has_left(self, protocol: Any) -> bool:
        is_closing = isinstance(protocol, Socket) and protocol.state != Socket.STATE_OPEN
        return is_closing or "disconnected" in self.connections.get(protocol, {"disconnected": 0})

    async def drain(self, port: Any) -> None:
        """Take no new connection, say goodbye, wait for what is under way, and end what is left."""
        port.stopListening()
        for protocol in list(self.connections):
            if isinstance(protocol, Socket):
                protocol.say_going_away()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DRAIN_SECONDS
        while self._is_busy() and loop.time() < deadline:  # noqa: ASYNC110 what ends here sets no event
            await asyncio.sleep(0.02)
        # Not only the applications: a request of Django's has tasks of its own, and CPython crashes on pending ones.
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=CANCEL_SECONDS)

    def _is_busy(self) -> bool:
        has_sockets = any(
            isinstance(protocol, Socket) and "disconnected" not in details
            for protocol, details in self.connections.items()
        )
        return has_sockets or bool(self._applications())

    def _applications(self) -> list[asyncio.Future[Any]]:
        found = (details.get("application_instance") for details in self.connections.values())
        return [application for application in found if application is not None and not application.done()]


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    if options.parent:
        die_with_parent(options.parent)
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "lorapilot.settings")
    try:
        listening = socket.socket(fileno=options.fd) if options.fd else listen(options.host, options.port)
    except OSError as error:
        print(f"Cannot listen on {options.host}:{options.port}: {os.strerror(error.errno or 0)}.", file=sys.stderr)  # noqa: T201
        return CANNOT_LISTEN
    from django.conf import settings
    from django.utils.module_loading import import_string

    application = import_string(options.application)
    print(f"Listening on {address_of(listening)}", flush=True)  # noqa: T201 a person or `manage.py up` reads it
    PilotServer(application, max_body_bytes=settings.MAX_BODY_BYTES).serve(listening)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is said and done; a usual exit would wait for a view that hangs in a thread


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lorapilot.server", description="Serve LoRA Pilot's web side.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7878, help="0: any free port")
    parser.add_argument(
        "--fd", type=int, default=0, help="a listening socket that was handed down, instead of an address"
    )
    parser.add_argument("--parent", type=int, default=0, help="end when the process with this pid does")
    parser.add_argument(
        "--application", default="lorapilot.asgi.application", help="dotted path of the ASGI application"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
