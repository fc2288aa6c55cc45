"""How many points a killed logger left where its data lie; in the environment that has it.

python count.py '{"logger": "wandb offline", "folder": "..."}'      prints {"points": n}
"""

from __future__ import annotations

import glob
import json
import os
import sqlite3
import sys


def wandb_offline(folder: str) -> int:
    from wandb.proto import wandb_internal_pb2

    points = 0
    # A link to the latest run leads to the same file once more.
    for path in set(map(os.path.realpath, glob.glob(f"{folder}/**/*.wandb", recursive=True))):
        with open(path, "rb") as file:
            data = file.read()
        for content in leveldb_records(data):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                keys = {item.key or "/".join(item.nested_key) for item in record.history.item}
                points += sum(key.startswith("train") for key in keys)
    return points


def leveldb_records(data: bytes) -> list[bytes]:
    """Return the whole records of a LevelDB log: blocks of 32 KiB, chunks with (CRC, length, type:
    1 whole, 2 first, 3 middle, 4 last). wandb's own file header has the size of a chunk's."""
    block, head = 32 << 10, 7
    found, part, at = [], b"", head
    while at + head <= len(data):
        left = block - at % block
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if left < head or kind == 0:
            at += left  # the rest of a block that was too small for a chunk
            continue
        chunk = data[at + head : at + head + length]
        if len(chunk) < length:
            break
        part = chunk if kind in (1, 2) else part + chunk
        if kind in (1, 4):
            found.append(part)
        at += head + length
    return found


def neptune_offline(folder: str) -> int:
    from neptune_api.proto.neptune_pb.ingest.v1.common_pb2 import UpdateRunSnapshot

    updates = "SELECT operation FROM run_operations WHERE operation_type = 0"
    return sum(
        len(UpdateRunSnapshot.FromString(data).append)
        for path in glob.glob(f"{folder}/**/*.sqlite3", recursive=True)
        for (data,) in _rows(path, updates)
    )


def trackio(folder: str) -> int:
    points = 0
    for path in glob.glob(f"{folder}/**/*.db", recursive=True):
        for (text,) in _rows(path, "SELECT metrics FROM metrics"):
            points += sum(key.startswith("train") for key in json.loads(text))
    return points


def tensorboard(folder: str) -> int:
    from tensorboardX.proto.event_pb2 import Event

    points = 0
    for path in glob.glob(f"{folder}/events.*"):
        with open(path, "rb") as file:
            data = file.read()
        at = 0
        while at + 12 <= len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            if at + 16 + length > len(data):
                break
            event = Event()
            event.ParseFromString(data[at + 12 : at + 12 + length])
            points += len(event.summary.value)
            at += 16 + length
    return points


def _rows(path: str, query: str) -> list[tuple]:
    try:
        return sqlite3.connect(path).execute(query).fetchall()
    except sqlite3.OperationalError:  # another table, or no row yet
        return []


COUNTS = {
    "wandb offline": wandb_offline,
    "neptune-scale offline": neptune_offline,
    "trackio": trackio,
    "TensorBoard": tensorboard,
}

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps({"points": COUNTS[job["logger"]](job["folder"])}))
