"""Faults of a network that break nothing at once: for `TcpProxy.fail`, beside those of `proxy`."""

from __future__ import annotations

import re
import socket

from tests.support.proxy import Action, Exchange

_LENGTH = re.compile(rb"(?i)(content-length: *)(\d+)")


def half_open() -> Action:
    """Pass on the response, and be gone: nobody tells the client, and the next request meets nobody."""

    def act(exchange: Exchange) -> bool:
        exchange.client.sendall(exchange.forward())
        exchange.proxy.wait_for_close(exchange.client)
        return False

    return act


def half_closed() -> Action:
    """Let the server do it, close the way back without a word, and go on listening."""

    def act(exchange: Exchange) -> bool:
        exchange.forward()
        exchange.client.shutdown(socket.SHUT_WR)
        exchange.proxy.wait_for_close(exchange.client)
        return False

    return act


def trickle(pieces: int, pause_s: float) -> Action:
    """Pass on the response in so many pieces, with a pause before each."""

    def act(exchange: Exchange) -> bool:
        response = exchange.forward()
        size = -(-len(response) // pieces)
        for at in range(0, len(response), size):
            exchange.proxy.closing.wait(pause_s)
            exchange.client.sendall(response[at : at + size])
        return True

    return act


def wrong_length(more: int) -> Action:
    """Pass on the response with a Content-Length that is so much more than the truth, or less.

    Said to be shorter, its rest stands in front of the connection's next response.
    """

    def act(exchange: Exchange) -> bool:
        head, empty_line, body = exchange.forward().partition(b"\r\n\r\n")
        said = b"%d" % max(0, len(body) + more)
        head = _LENGTH.sub(lambda found: found[1] + said, head)
        exchange.client.sendall(head + empty_line + body)
        return more <= 0  # closed too early; else the client waits for what never comes

    return act
