"""Inputs that once broke a decoder, by target; each is mended, and stays so."""

from __future__ import annotations

_CARD = (
    b'\x00{"version":1,"run_id":"","run_key":"","experiment_name":"","run_name":"","world_size":1,'
    b'"tags":{},'
)
FINDINGS = {
    # A head whose CRC holds and whose sequences are a number.
    "segment": [b"\x01\x93\x00\x06\xc4\x00"],
    # Cards that somebody mended by hand: a start that is no number, a session that is no id.
    "card": [
        _CARD + b'"start_ms":"","sessions":{}}',
        _CARD
        + b'"start_ms":0,"sessions":{"zz":{"rank":0,"node":"","pid":1,"primary":true,"start_ms":0}}}',
    ],
}
