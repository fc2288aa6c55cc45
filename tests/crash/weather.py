"""The weather on the way to a server: which request meets which fault, by chance."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from email.utils import formatdate

from tests.support.proxy import (
    Action,
    Exchange,
    answer,
    black_hole,
    cut,
    delay,
    lose_response,
    pass_on,
    reset,
)
from tests.support.slow_faults import half_closed, half_open, trickle, wrong_length

_PAGE = b"<html><head><title>Error</title></head><body><h1>It went wrong</h1></body></html>"
_JSON = b'{"error_code": "%s", "message": "it went wrong"}'

#: How each kind of fault is made, and how often it comes. The slow ones, which cost the daemon its
#: timeout or the server's word, come seldom, or there would be few faults in an hour.
KINDS: Mapping[str, tuple[Callable[[random.Random], Action], int]] = {
    "latency": (lambda rng: delay(rng.choice((0.02, 0.1, 0.3))), 6),
    "longer than the timeout": (lambda rng: delay(6.0), 1),
    "reset": (lambda rng: reset(), 12),
    "black hole": (lambda rng: black_hole(), 1),
    "half-open": (lambda rng: half_open(), 1),
    "half-closed": (lambda rng: half_closed(), 6),
    "cut in mid-response": (lambda rng: cut(rng.choice((1, 12, 60, 150, 250))), 12),
    "commit, response lost": (lambda rng: lose_response(), 15),
    "429": (lambda rng: _busy(429, rng), 3),
    "503": (lambda rng: _busy(503, rng), 3),
    "503 of MLflow": (
        lambda rng: _json(503, b"TEMPORARILY_UNAVAILABLE"),
        6,
    ),
    "500 with HTML": (lambda rng: answer(500, _PAGE), 10),
    "502 with HTML": (lambda rng: answer(502, _PAGE), 6),
    "401": (lambda rng: answer(401, b"Unauthorized", headers={"WWW-Authenticate": "Basic"}), 8),
    "redirect": (
        lambda rng: answer(rng.choice((301, 302, 307)), headers={"Location": "/login"}),
        8,
    ),
    "200 of a login page": (lambda rng: answer(200, _PAGE), 8),
    "slow trickle": (lambda rng: trickle(rng.randint(4, 12), 0.05), 3),
    "Content-Length too long": (lambda rng: wrong_length(rng.choice((1, 100))), 8),
    "Content-Length too short": (lambda rng: wrong_length(-rng.choice((1, 2, 30))), 8),
}
#: How long the same mood lasts.
MOOD_S = (1.0, 5.0)


class Weather:
    """An action for a `TcpProxy`: passes requests on or breaks them, in moods that change.

    A mood is a share of requests that are hit, and the kinds that they are hit with: all, a few, or
    one alone, as when one of three servers behind a balancer is broken.

    Args: faults: where they are counted, by kind.
    """

    def __init__(self, rng: random.Random, faults: Counter[str]) -> None:
        self._rng, self._faults = rng, faults
        self._lock = threading.Lock()  # each connection has a thread of its own
        self._until_s = 0.0
        self._share, self._kinds = 0.0, list(KINDS)

    def __call__(self, exchange: Exchange) -> bool:
        with self._lock:
            action = self._draw(time.monotonic())
        return action(exchange)

    def _draw(self, now_s: float) -> Action:
        rng = self._rng
        if now_s >= self._until_s:
            self._until_s = now_s + rng.uniform(*MOOD_S)
            self._share = rng.choice((0.5, 0.8, 0.95, 1.0))
            few = rng.sample(sorted(KINDS), rng.randint(1, 3))
            self._kinds = rng.choice((list(KINDS), list(KINDS), few))
        if rng.random() >= self._share:
            return pass_on()
        weights = [KINDS[kind][1] for kind in self._kinds]
        (kind,) = rng.choices(self._kinds, weights)
        self._faults[kind] += 1
        return KINDS[kind][0](rng)


def _busy(status: int, rng: random.Random) -> Action:
    """Retry-After in both of its forms; 0 is allowed, and keeps the torture going."""
    in_a_second = formatdate(time.time() + 1, usegmt=True)
    asked = rng.choice(("0", "0", "0", "1", in_a_second))
    return answer(status, _PAGE, headers={"Retry-After": asked})


def _json(status: int, code: bytes) -> Action:
    return answer(status, _JSON % code, content_type="application/json")
