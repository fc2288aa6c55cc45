"""Ranks that do nothing but send: prepacked frames, to a daemon or down a bare pipe.

    python load.py '{"mode": "relay", "endpoint": "ipc://...", "clients": 8, "frames": 100, ...}'

Job:    mode ("relay" or "bare"), endpoint, run_id, first (number of the first client), clients,
        runs (spread over so many runs), frames (per client), records (per frame), metrics (per
        record), distinct (each frame with points of its own).
        Prints "ready", waits for a line, sends, prints JSON: begin_s and end_s (monotonic
        clock), points, bytes, attach_s (of all), and ack_ms: how long each frame waited.
"""

from __future__ import annotations

import json
import sys
import time

import zmq

from mlflow_relay import frames, messages, records

WINDOW_BYTES = 1 << 20  # as sender.WINDOW_BYTES


def body(count: int, metrics: int, first_step: int = 0, offset: float = 0.0) -> bytes:
    packer = records.MetricsPacker()
    keys = [f"train/loss_{index}" for index in range(metrics)]
    now_ms = time.time_ns() // 1_000_000
    entries = [
        frames.pack_entry(
            packer.pack(dict.fromkeys(keys, step * 1.1 + offset), step, now_ms + step)
        )
        for step in range(first_step, first_step + count)
    ]
    return b"".join(entries)


class Client:
    """One session over one socket."""

    def __init__(self, context: zmq.Context, job: dict, number: int, content: bytes) -> None:
        self.session = number.to_bytes(16, "little")
        self.run_id = f"{number % job['runs'] + job['run_id']:032x}"
        count = job["records"]
        # The same points in each frame, unless MLflow is to see them: doubles, also of two clients
        # within one millisecond, cost it a search of all that the run has.
        self.frames = [
            frames.pack_frame(
                self.session,
                index * count,
                count,
                body(count, job["metrics"], index * count, number / 1e3)
                if job["distinct"]
                else content,
            )
            for index in range(job["frames"])
        ]
        self.records, self.sent, self.acked, self.rank = count, 0, 0, number
        self.window = max(1, WINDOW_BYTES // len(self.frames[0])) if self.frames else 1
        self.sent_s: list[float] = []
        self.ack_ms: list[float] = []
        self.socket = context.socket(zmq.DEALER)
        self.socket.sndhwm = 0
        self.socket.connect(job["endpoint"])

    def attach(self) -> None:
        card = {
            "session": self.session,
            "run_id": self.run_id,
            "run_key": self.run_id,
            "experiment_name": "bench",
            "run_name": "",
            "rank": self.rank,
            "world_size": 1,
            "node": "bench",
            "pid": 1,
            "primary": True,
            "start_ms": time.time_ns() // 1_000_000,
            "tags": {},
            "first_seq": 0,
            "node_count": 1,
        }
        self.socket.send_multipart([messages.ATTACH, messages.pack_map(card)])

    def send(self) -> None:
        while self.sent < len(self.frames) and self.sent - self.acked < self.window:
            self.socket.send_multipart([messages.DATA, self.frames[self.sent]], copy=False)
            self.sent += 1
            self.sent_s.append(time.monotonic())

    def receive(self) -> None:
        now_s = time.monotonic()
        kind, payload = self.socket.recv_multipart()
        if kind == messages.ACK:
            acked = messages.unpack_ack(payload)[1] // self.records
            self.ack_ms += [(now_s - each) * 1e3 for each in self.sent_s[self.acked : acked]]
            self.acked = acked

    @property
    def is_done(self) -> bool:
        return self.acked == len(self.frames)


def main(job: dict) -> None:
    context = zmq.Context()
    content = body(job["records"], job["metrics"]) if job["frames"] else b""
    numbers = range(job["first"], job["first"] + job["clients"])
    points = job["clients"] * job["frames"] * job["records"] * job["metrics"]
    if job["mode"] == "bare":
        socket = context.socket(zmq.PUSH)
        socket.connect(job["endpoint"])
        frame = frames.pack_frame(bytes(16), 0, job["records"], content)
        wait_for_start()
        begin_s = time.monotonic()
        for _ in range(job["clients"] * job["frames"]):
            socket.send(frame, copy=False)
        tell(begin_s=begin_s, points=points, bytes=len(frame) * job["clients"] * job["frames"])
        context.destroy(linger=60_000)
        return
    clients = [Client(context, job, number, content) for number in numbers]
    poller = zmq.Poller()
    for client in clients:
        poller.register(client.socket, zmq.POLLIN)
    wait_for_start()
    attach_s = time.monotonic()
    attach_all(clients)
    attach_s = time.monotonic() - attach_s
    if job["frames"]:
        wait_for_start()
    begin_s = time.monotonic()
    by_socket = {client.socket: client for client in clients}
    waiting = set(clients) if job["frames"] else set()
    for client in waiting:
        client.send()
    while waiting:
        for socket, _ in poller.poll():
            client = by_socket[socket]
            client.receive()
            client.send()
            if client.is_done:
                waiting.discard(client)
    tell(
        begin_s=begin_s,
        end_s=time.monotonic(),
        points=points,
        bytes=sum(len(each.frames[0]) * len(each.frames) for each in clients if each.frames),
        attach_s=attach_s,
        ack_ms=[round(each, 3) for client in clients for each in client.ack_ms],
    )
    if job.get("stay"):
        sys.stdin.readline()


def attach_all(clients: list[Client]) -> None:
    """Attach all at once, and wait until each was answered."""
    poller = zmq.Poller()
    for client in clients:
        client.attach()
        poller.register(client.socket, zmq.POLLIN)
    waiting = {client.socket for client in clients}
    while waiting:
        for socket, _ in poller.poll():
            if socket.recv_multipart()[0] == messages.ATTACHED:
                waiting.discard(socket)


def wait_for_start() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def tell(**found: object) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
