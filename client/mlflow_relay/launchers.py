"""What each launcher tells the processes that it starts: its variables, as data. Pure.

A new launcher is a row in this file, and an environment of it among the tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from .errors import LaunchError

#: slurm/slurm.h, SLURM_MAX_NORMAL_STEP_ID: above it are batch, extern and interactive pseudo steps.
SLURM_STEP_MAX = 0xFFFFFFF0


class Source(NamedTuple):
    """The variables of one launcher; of several names for a thing the first that is set counts."""

    launcher: str
    rank: tuple[str, ...]
    size: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_size: tuple[str, ...] = ()
    node_rank: tuple[str, ...] = ()
    node_count: tuple[str, ...] = ()
    #: What else differs between two launches, so that a wrapper shell is known by what it carries.
    marks: tuple[str, ...] = ()


TORCHRUN = Source(
    "torchrun",
    rank=("RANK",),
    size=("WORLD_SIZE",),
    local_rank=("LOCAL_RANK",),
    local_size=("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),  # DeepSpeed's launcher says LOCAL_SIZE
    node_rank=("GROUP_RANK", "NODE_RANK"),
    node_count=("GROUP_WORLD_SIZE",),
    marks=("MASTER_PORT", "TORCHELASTIC_RUN_ID"),
)
SLURM = Source(
    "slurm",
    rank=("SLURM_PROCID",),
    # The step's own numbers first: SLURM_NTASKS may be the whole job's.
    size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
    local_rank=("SLURM_LOCALID",),
    node_rank=("SLURM_NODEID",),
    node_count=("SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
    marks=("SLURM_JOB_ID", "SLURM_STEP_ID"),
)
#: Lightning starts the script once more per device with these, and sets them in rank 0 as well.
#: lightning/pytorch/strategies/launchers/subprocess_script.py, _call_children_scripts
LIGHTNING = Source(
    "lightning",
    rank=("LOCAL_RANK",),
    size=("WORLD_SIZE",),
    local_rank=("LOCAL_RANK",),
    node_rank=("NODE_RANK",),
    marks=("MASTER_PORT",),
)
MPI = (
    Source(  # Open MPI; its NODE_RANK counts ranks on the node, not nodes
        "mpi",
        rank=("OMPI_COMM_WORLD_RANK",),
        size=("OMPI_COMM_WORLD_SIZE",),
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        marks=("PMIX_NAMESPACE",),
    ),
    Source(  # MVAPICH2
        "mpi",
        rank=("MV2_COMM_WORLD_RANK",),
        size=("MV2_COMM_WORLD_SIZE",),
        local_rank=("MV2_COMM_WORLD_LOCAL_RANK",),
        local_size=("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Source(  # Cray PALS
        "mpi",
        rank=("PALS_RANKID",),
        size=("PMI_SIZE",),
        local_rank=("PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"),
        local_size=("PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
        node_rank=("PALS_NODEID",),
        marks=("PALS_APID",),
    ),
    Source(  # MPICH and Intel MPI (hydra)
        "mpi",
        rank=("PMI_RANK",),
        size=("PMI_SIZE",),
        local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        local_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
    # PMIx alone names no size. Last: Slurm's interactive shells carry PMIX_RANK=0 as well.
    Source("mpi", rank=("PMIX_RANK",), size=(), marks=("PMIX_NAMESPACE",)),
)


class Found(NamedTuple):
    """What one launcher's variables say; None where they say nothing."""

    source: Source
    rank: int | None
    size: int | None
    local_rank: int | None = None
    local_size: int | None = None
    node_rank: int | None = None
    node_count: int | None = None


PLAIN = Found(Source("plain", rank=(), size=()), rank=0, size=1)


def nearest_launcher(env: Mapping[str, str], *, needed: bool) -> Found:
    """Return what the launcher nearest to this process says.

    Args: needed: False where arguments say it all; a damaged environment is then no error.
    """
    try:
        return _nearest(env)
    except LaunchError:
        if needed:
            raise
        return PLAIN


def _nearest(env: Mapping[str, str]) -> Found:
    # torchrun first: inside srun or mpirun it starts more ranks than they know of. Lightning's own
    # launcher only where nobody else started several processes.
    if text(env, "TORCHELASTIC_RUN_ID") or (text(env, "RANK") and text(env, "WORLD_SIZE")):
        torchrun = _read(env, TORCHRUN)
        if torchrun is not None:
            return torchrun
    outer = outer_launcher(env)
    if outer is not None and outer.size != 1:
        return outer
    lightning = _read(env, LIGHTNING) if text(env, "WORLD_SIZE") else None
    if lightning is not None:
        # Of a later node nobody says how many ranks came before it.
        return lightning._replace(rank=None) if lightning.node_rank else lightning
    if outer is None:
        for name in ("RANK", "LOCAL_RANK", "NODE_RANK"):
            if count(env, (name,)):
                raise LaunchError(
                    f"{name}={env[name]} says that this is one of several processes, but not of "
                    "how many: set RANK and WORLD_SIZE, or pass rank=..., world_size=..."
                )
    return outer or PLAIN


def outer_launcher(env: Mapping[str, str]) -> Found | None:
    """Return what srun or mpirun says, or None if neither started this process.

    An mpirun inside a Slurm job starts its daemons with srun, and ranks on all but the first node
    inherit those daemons' SLURM_PROCID: Slurm counts only where MPI, if present, says the same.
    """
    slurm = _read(env, SLURM) if slurm_step(env) is not None else None
    mpi = next((each for row in MPI if (each := _read(env, row)) is not None), None)
    if mpi is not None and mpi.size is None and mpi.rank == 0:
        mpi = None  # a shell of Slurm's, see MPI above
    if slurm is None or mpi is None:
        return slurm or mpi
    return slurm if mpi.rank == slurm.rank and mpi.size in {None, slurm.size} else mpi


def slurm_step(env: Mapping[str, str]) -> int | None:
    """Return the step's number if srun started this process: no batch, extern, interactive step."""
    step = count(env, ("SLURM_STEP_ID", "SLURM_STEPID"))
    return step if step is not None and step <= SLURM_STEP_MAX else None


def _read(env: Mapping[str, str], source: Source) -> Found | None:
    """Return what this launcher's variables say, or None if the rank is not among them."""
    rank = count(env, source.rank)
    if rank is None:
        return None
    found = Found(
        source,
        rank,
        size=count(env, source.size),
        local_rank=count(env, source.local_rank),
        local_size=count(env, source.local_size),
        node_rank=count(env, source.node_rank),
        node_count=count(env, source.node_count),
    )
    if found.size is not None and rank >= found.size:
        raise LaunchError(
            f"{named(env, source.rank)} is not below {named(env, source.size)}: "
            "ranks count from 0. Mend the environment, or pass rank=..., world_size=..."
        )
    if source is SLURM:
        per_node = text(env, "SLURM_STEP_TASKS_PER_NODE") or text(env, "SLURM_TASKS_PER_NODE")
        return found._replace(local_size=_tasks_on_node(per_node or "", found.node_rank or 0))
    return found


def _tasks_on_node(tasks_per_node: str, node: int) -> int | None:
    """Return one node's number of tasks out of Slurm's '4(x2),3', or None if it is not there."""
    for part in tasks_per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        node -= int(match[2] or 1)
        if node < 0:
            return int(match[1])
    return None


# --- reading variables


def text(env: Mapping[str, str], name: str) -> str | None:
    """Return the variable's value, or None if it is absent or blank."""
    return env.get(name, "").strip() or None


def count(env: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    """Return the first of these variables that is set, as a number from 0.

    Raises: LaunchError: it is none.
    """
    for name in names:
        value = text(env, name)
        if value is None:
            continue
        if not (value.isascii() and value.isdigit()):
            raise LaunchError(
                f"{name}={value[:40]!r} is no number from 0: mend or unset it, "
                "or pass rank=..., world_size=..., run_key=..."
            )
        return int(value)
    return None


def named(env: Mapping[str, str], names: tuple[str, ...]) -> str:
    """Return 'NAME=value' of the first of these variables that is set."""
    return next((f"{name}={env[name]}" for name in names if text(env, name)), " or ".join(names))
