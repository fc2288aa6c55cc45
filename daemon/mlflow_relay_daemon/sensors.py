"""What a node can measure of itself, under MLflow's own names: CPU, memory, disk, network, GPUs.

A sensor is a function that returns a few values. One that fails is dropped, with one line in the
log, and the others go on. GPU libraries are asked only where they are installed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import psutil

log = logging.getLogger(__name__)

MB = 1e6  # mlflow.system_metrics.metrics: megabytes are decimal
ROOT = "/"
#: Count from the machine's start; a run is told what came since its own.
COUNTERS = ("network_receive_megabytes", "network_transmit_megabytes")

Values = dict[str, float]


class Sensor(NamedTuple):
    """One thing that can be measured, and that can fail on its own."""

    name: str
    read: Callable[[], Values]


class Sensors:
    """The sensors of this node that have not failed."""

    def __init__(self, sensors: Iterable[Sensor]) -> None:
        self._sensors = list(sensors)

    def read(self) -> Values:
        """Return the values of all sensors; drop those that fail."""
        values: Values = {}
        for sensor in list(self._sensors):
            try:
                values |= sensor.read()
            except Exception as error:  # noqa: BLE001  # whatever a vendor's library raises
                self._sensors.remove(sensor)
                log.warning("node metrics: %s is left out from now on: %s", sensor.name, error)
        return values


def node_sensors() -> list[Sensor]:
    """Return a sensor for each thing that this node has."""
    return [
        Sensor("cpu", _cpu),
        Sensor("memory", _memory),
        Sensor("disk", _disk),
        Sensor("network", _network),
        *_gpus("NVIDIA GPUs", _nvidia),
        *_gpus("AMD GPUs", _amd),
    ]


def _cpu() -> Values:
    return {"cpu_utilization_percentage": psutil.cpu_percent()}  # since it was asked last


def _memory() -> Values:
    memory = psutil.virtual_memory()
    return {
        "system_memory_usage_megabytes": round(memory.used / MB, 1),
        "system_memory_usage_percentage": round(memory.used / memory.total * 100, 1),
    }


def _disk() -> Values:
    disk = psutil.disk_usage(ROOT)
    return {
        "disk_usage_percentage": disk.percent,
        "disk_usage_megabytes": round(disk.used / MB, 1),
        "disk_available_megabytes": round(disk.free / MB, 1),
    }


def _network() -> Values:
    network = psutil.net_io_counters()
    return dict(zip(COUNTERS, (network.bytes_recv / MB, network.bytes_sent / MB), strict=True))


# ── GPUs ──


def _gpus(name: str, find: Callable[[], list[Sensor]]) -> list[Sensor]:
    try:
        return find()
    except ImportError:
        return []  # not installed: nobody asked for them
    except Exception as error:  # noqa: BLE001  # no driver, no GPU, no permission: each library's own
        log.info("node metrics: no %s: %s", name, error)
        return []


def _nvidia() -> list[Sensor]:
    import pynvml

    pynvml.nvmlInit()
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        gpu, handle = f"gpu_{index}", pynvml.nvmlDeviceGetHandleByIndex(index)
        for what, read in (
            ("memory", _nvidia_memory),
            ("utilization", _nvidia_utilization),
            ("power", _nvidia_power),
        ):
            found.append(Sensor(f"{what} of {gpu}", _bound(read, pynvml, handle, gpu)))
    return found


def _nvidia_memory(nvml: Any, handle: Any, gpu: str) -> Values:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        f"{gpu}_memory_usage_percentage": round(memory.used / memory.total * 100, 1),
        f"{gpu}_memory_usage_megabytes": round(memory.used / MB, 1),
    }


def _nvidia_utilization(nvml: Any, handle: Any, gpu: str) -> Values:
    return {f"{gpu}_utilization_percentage": nvml.nvmlDeviceGetUtilizationRates(handle).gpu}


def _nvidia_power(nvml: Any, handle: Any, gpu: str) -> Values:
    milliwatts = nvml.nvmlDeviceGetPowerUsage(handle)
    limit_milliwatts = nvml.nvmlDeviceGetEnforcedPowerLimit(handle)
    return {
        f"{gpu}_power_usage_watts": round(milliwatts / 1000, 1),
        f"{gpu}_power_usage_percentage": round(milliwatts / limit_milliwatts * 100, 1),
    }


def nvidia_memory_by_pid() -> dict[int, Values]:
    """Return which process holds how much memory of which NVIDIA GPU.

    Raises: ImportError; whatever the library raises.
    """
    import pynvml

    pynvml.nvmlInit()  # counted by the library: any number of times
    found: dict[int, Values] = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.usedGpuMemory is not None:  # not told, in some virtual machines
                values = found.setdefault(process.pid, {})
                values[f"gpu_{index}_memory_usage_megabytes"] = round(process.usedGpuMemory / MB, 1)
    return found


def _amd() -> list[Sensor]:
    from pyrsmi import rocml

    rocml.smi_initialize()
    found = []
    for index in range(rocml.smi_get_device_count()):
        for what, read in (
            ("memory", _amd_memory),
            ("utilization", _amd_utilization),
            ("power", _amd_power),
        ):
            found.append(Sensor(f"{what} of gpu_{index}", _bound(read, rocml, index)))
    return found


def _amd_memory(rocml: Any, index: int) -> Values:
    used = _amd_value(rocml.smi_get_device_memory_used(index))
    total = _amd_value(rocml.smi_get_device_memory_total(index))
    return {
        f"gpu_{index}_memory_usage_percentage": round(used / total * 100, 1),
        f"gpu_{index}_memory_usage_megabytes": round(used / MB, 1),
    }


def _amd_utilization(rocml: Any, index: int) -> Values:
    value = _amd_value(rocml.smi_get_device_utilization(index))
    return {f"gpu_{index}_utilization_percentage": value}


def _amd_power(rocml: Any, index: int) -> Values:
    # The library does not tell the limit, so there is no power_usage_percentage.
    return {f"gpu_{index}_power_usage_watts": _amd_value(rocml.smi_get_device_average_power(index))}


def _amd_value(value: float) -> float:
    """Raises: RuntimeError: it is -1, by which this library says that it failed."""
    if value < 0:
        raise RuntimeError("the library returned an error")
    return value


def _bound(read: Callable[..., Values], *arguments: Any) -> Callable[[], Values]:
    return lambda: read(*arguments)
