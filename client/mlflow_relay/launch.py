"""Who am I: rank, node, and the run key that all ranks of one training agree on without talking.

Pure, but for its pid and two functions that `detect` is given to ask what only /proc knows.

    what             taken from, first that answers
    rank and sizes   arguments, torchrun, srun, MPI, Lightning's own launcher; else 0 of 1
    run key          argument, MLFLOW_RELAY_RUN_KEY, srun's job and step, torchrun's run id, MPI's
                     launch ids, the launcher process of this node; else LaunchError

A run key may only be something that never comes back: two trainings under one key would be mixed
into one MLflow run, which is worse than an error. So a job id is no key (a batch script may train
twice), nor is a word that a user chose as rendezvous id. Where even this is not enough, a name must
be given: two trainings one after the other inside one srun of several tasks, and those named in
processes.launcher_process.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Mapping
from typing import NamedTuple

from .errors import LaunchError
from .launchers import (
    LIGHTNING,
    PLAIN,
    SLURM,
    TORCHRUN,
    Found,
    count,
    named,
    nearest_launcher,
    outer_launcher,
    slurm_step,
    text,
)
from .processes import launcher_process, own_process

__all__ = ["Launch", "detect", "launcher_process", "random_key", "relay_run_id"]

#: For a process that is alone any new name would do. It is given its own, because Lightning's later
#: ranks are its children, and can tell the name of their parent.
random_key = own_process

RUN_KEY_VARIABLE = "MLFLOW_RELAY_RUN_KEY"
RUN_KEY_CHARS_MAX = 500  # it becomes a tag, and is shown in one line of `status`

#: Ours alone, made once with uuid4; another value would give every run a new id.
_RUN_ID_NAMESPACE = uuid.UUID("e373ba2b-4656-4f91-93ef-be3972d229bf")
#: `torchrun --standalone` makes a UUID; what users choose ("job1", "100") comes back next time.
_UUID = r"(?i)[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}"


class Launch(NamedTuple):
    """This process's place among the ranks of its training, and the name that all of them share."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int | None  #: ranks on this node, None if not told
    node_rank: int | None
    node_count: int | None
    launcher: str  #: 'slurm', 'torchrun', 'mpi', 'lightning', 'explicit' or 'plain'
    run_key: str
    restart_count: int  #: how often the launcher or the batch system has started these ranks again


def detect(
    env: Mapping[str, str],
    *,
    rank: int | None = None,
    world_size: int | None = None,
    run_key: str | None = None,
    launcher_process: Callable[[Mapping[str, str]], str] = launcher_process,
    random_key: Callable[[], str] = random_key,
) -> Launch:
    """Return this process's place; arguments win over the environment.

    Ask once per process and keep the answer: when a launcher dies, its ranks get another parent.

    Args:
        env: os.environ, or what a test makes of it.
        rank: of this process, 0..world_size-1; goes together with world_size.
        world_size: ranks of the training. 1 means "a training of its own", whatever was launched.
        run_key: equal in all ranks of this training, and in no other training.
        launcher_process: the real one but in tests; asked only where no id is better.
        random_key: the real one but in tests; names a process that is alone.
    Returns: every field that arguments and environment tell.
    Raises: LaunchError: a value is no number or out of range; or there are several ranks and
        nothing that names their launch. The text says what was found and what to pass.
    """
    found = nearest_launcher(env, needed=rank is None or world_size is None)
    here = _place(found, rank, world_size)
    key = run_key if run_key is not None else text(env, RUN_KEY_VARIABLE)
    if key is None:
        key = _run_key(env, found, here, launcher_process, random_key)
    if not (0 < len(key) <= RUN_KEY_CHARS_MAX and key.isprintable()):
        raise LaunchError(
            f"run_key={key[:40]!r}: give 1 to {RUN_KEY_CHARS_MAX} printable characters"
        )
    restarts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    restart_count = sum(count(env, (name,)) or 0 for name in restarts)
    return here._replace(run_key=key, restart_count=restart_count)


def relay_run_id(run_key: str, ordinal: int) -> str:
    """Return the relay run id: 32 hex digits, equal wherever key and ordinal are equal.

    Args:
        run_key: Launch.run_key.
        ordinal: which start_run of its process this is, counted from 1. It is always part of what
            is hashed ('key#1'), so that no key that users choose can meet another key's ordinal.
    """
    return uuid.uuid5(_RUN_ID_NAMESPACE, f"{run_key}#{ordinal}").hex


# --- rank and sizes


def _place(found: Found, rank: int | None, world_size: int | None) -> Launch:
    """Return arguments and findings as one Launch, run key and restarts still empty."""
    launcher = found.source.launcher if rank is None and world_size is None else "explicit"
    size = found.size if world_size is None else world_size
    if size == 1 and rank in {None, 0}:
        # Whichever rank its launcher gave it: a process with world_size=1 is a training of its own.
        return Launch(0, 0, 1, 1, 0, 1, launcher, "", 0)
    if rank is None and found.source is not PLAIN.source:
        rank = found.rank
    if rank is None or size is None:
        said = f"rank={rank}, world_size={size}".replace("None", "unknown")
        raise LaunchError(
            f"{found.source.launcher}: {said}. Pass both, rank=... and world_size=..., "
            "or set RANK and WORLD_SIZE in every process"
        )
    if not 0 <= rank < size:
        raise LaunchError(f"rank={rank}, world_size={size}: ranks count from 0 to world_size - 1")
    if found.size not in {None, size}:  # these count the launcher's processes, not our ranks
        found = found._replace(local_rank=None, local_size=None)
    if found.node_count == 1:
        found = found._replace(local_size=size)
    return Launch(
        rank=rank,
        local_rank=rank if found.local_rank is None else found.local_rank,
        world_size=size,
        local_world_size=found.local_size,
        node_rank=found.node_rank,
        node_count=found.node_count,
        launcher=launcher,
        run_key="",
        restart_count=0,
    )


# --- the run key


def _run_key(
    env: Mapping[str, str],
    found: Found,
    here: Launch,
    launcher_process: Callable[[Mapping[str, str]], str],
    random_key: Callable[[], str],
) -> str:
    """Return what names this launch and no other.

    Raises: LaunchError: nothing does.
    """
    if here.world_size == 1:
        # Also below a Slurm step of one task: that may be a notebook server, a shell or a sweep,
        # and each training in it is one of its own. If it is the task itself, and is requeued, its
        # run goes on. Lightning's later ranks find the key as their parent.
        is_task = text(env, "SLURM_TASK_PID") == str(os.getpid())
        is_step = found.source is SLURM and found.size == 1 and slurm_step(env) is not None
        key = _slurm_id(env) if is_task and is_step else None
        return key or f"launcher/{random_key()}"
    if found.size is not None and found.size > here.world_size:
        raise LaunchError(
            f"world_size={here.world_size} was passed, but {named(env, found.source.size)}: "
            "several trainings in one launch need a name each, run_key=..."
        )
    key = _launch_id(env, found)
    if key is not None:
        return key
    if not _is_on_one_node(env, here):
        raise LaunchError(_nameless(env, found, here))
    if found.source is LIGHTNING and here.local_rank == 0:
        return f"launcher/{random_key()}"  # rank 0 is the script itself, the others its children
    # Ranks that were not started by that launcher but by one of its processes (mp.spawn) have no
    # variables of their own to know a wrapper by: their parent it is.
    source = found.source if found.size == here.world_size else PLAIN.source
    names = (*source.rank, *source.size, *source.local_rank, *source.marks)
    try:
        return f"launcher/{launcher_process({name: env[name] for name in names if name in env})}"
    except OSError as error:
        raise LaunchError(
            f"rank {here.rank} of {here.world_size} cannot see its launcher in /proc ({error}). "
            f"{_ADVICE}"
        ) from error


def _launch_id(env: Mapping[str, str], found: Found) -> str | None:
    """Return the id that a launcher gave to this launch, or None where none is unique."""
    elastic = text(env, "TORCHELASTIC_RUN_ID")
    # `srun -n4 torchrun --standalone` is four trainings: a torchrun whose ranks are all on its
    # node is a launch of its own, and what stands around it names something larger.
    is_own_launch = found.source is TORCHRUN and elastic and found.size == found.local_size
    outer = None if is_own_launch else outer_launcher(env)
    if outer is not None and outer.size == 1:
        outer = None
    if outer is not None and outer.source is SLURM and (key := _slurm_id(env)) is not None:
        return key
    if elastic is not None and re.search(_UUID, elastic):
        return f"torchrun/{elastic}"
    return None if outer is None else _mpi_launch_id(env)


def _slurm_id(env: Mapping[str, str]) -> str | None:
    """Return the id of a Slurm step; it stays the same when the job is requeued."""
    cluster = text(env, "SLURM_CLUSTER_NAME") or "cluster"
    job = text(env, "SLURM_JOB_ID") or text(env, "SLURM_JOBID")
    # Of an array job, each element has a SLURM_JOB_ID of its own.
    return None if job is None else f"slurm/{cluster}/{job}/{slurm_step(env)}"


def _mpi_launch_id(env: Mapping[str, str]) -> str | None:
    """Return an MPI launch's id if it can never come back.

    Cray PALS: PALS_APID is a UUID. Open MPI up to 4: 128 random bits that mpirun draws for the
    transports, with its own address (some sites export the bits as a constant). Open MPI 5: host
    and pid of prterun, which come back one day, but not within one batch job (a namespace of
    another form is that of a Slurm shell around it). MPICH and Intel MPI have nothing: the name of
    their key-value space is behind a file descriptor, and PMI_JOBID may be the batch job's.
    """
    application = text(env, "PALS_APID")
    if application is not None:
        return f"mpi/{application}"
    drawn = text(env, "OMPI_MCA_orte_precondition_transports")
    address = text(env, "OMPI_MCA_orte_hnp_uri")  # 1976827904.0;tcp://192.0.2.2:56987;tcp6://...
    if drawn is not None and address is not None:
        return f"mpi/{drawn}/{';'.join(address.split(';')[:2])}"[:RUN_KEY_CHARS_MAX]
    namespace = text(env, "PMIX_NAMESPACE")
    if namespace is not None and namespace.startswith(("prterun-", "prte-")):
        for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"):
            job = text(env, name)
            if job is not None:
                return f"mpi/{job}/{namespace}"
    return None


def _is_on_one_node(env: Mapping[str, str], here: Launch) -> bool:
    """Tell whether all ranks are on this node, as far as anything says so."""
    if here.local_world_size is not None:
        return here.local_world_size == here.world_size
    if here.node_count is not None:
        return here.node_count == 1
    if here.node_rank or here.local_rank != here.rank:
        return False
    address = text(env, "MASTER_ADDR")
    if address is not None:
        return address in {"localhost", "127.0.0.1", "::1"}
    allocated = count(env, ("SLURM_JOB_NUM_NODES", "SLURM_NNODES"))
    return text(env, "NODE_RANK") is None and allocated in {None, 1}


_ADVICE = (
    "Give all ranks of this training one new name: start_run(run_key=...), or before the launch "
    f'export {RUN_KEY_VARIABLE}="$(uuidgen)" (Open MPI: mpirun -x {RUN_KEY_VARIABLE})'
)


def _nameless(env: Mapping[str, str], found: Found, here: Launch) -> str:
    source = found.source
    names = (*source.rank, *source.size, *source.local_size, *source.node_rank, *source.marks)
    names = (*names, "MASTER_ADDR", "SLURM_JOB_ID")
    seen = [f"{name}={env[name]}" for name in names if name in env]
    where = "on several nodes" if here.local_world_size is not None else "perhaps on several nodes"
    return (
        f"this is rank {here.rank} of {here.world_size} {where}, and nothing that all of them see "
        f"is new with every launch (found: {', '.join(seen) or 'nothing'}). {_ADVICE}"
    )
