"""Timing that holds on a busy machine: contenders take turns, and only ratios within a round are compared."""

import concurrent.futures
import datetime
import importlib.metadata
import math
import multiprocessing
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

SETTLE = 0.01  # seconds in which the spinning worker threads of the contender before go to sleep


class Ratio(NamedTuple):
    """How many times as fast as a peer, over the rounds."""

    median: float
    lower_quartile: float
    upper_quartile: float


def interleave(calls: Mapping[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds that one call of each contender takes, a figure a round.

    In each round every contender has its turn, the next one first each time: a call to warm up, then calls for at
    least `seconds`, the fastest of which is the figure, for other processes only ever add time. A call must return
    only when its results are there.
    """
    figures = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(SETTLE)
            calls[name]()
            figures[name].append(min(_call_times(calls[name], seconds)))
    return figures


def _call_times(call: Callable[[], Any], seconds: float) -> list[float]:
    times = []
    while sum(times) < seconds or not times:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def speed(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """How many times as fast we are: the median of the ratios within each round, and their quartiles.

    >>> speed([1.0, 2.0, 1.0], [2.0, 2.0, 3.0])
    Ratio(median=2.0, lower_quartile=1.5, upper_quartile=2.5)
    """
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(middle, lower, upper)


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean, which treats twice and half as fast alike.

    >>> geometric_mean([0.5, 2.0])
    1.0
    """
    return math.exp(statistics.fmean(math.log(value) for value in values))


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def limit_cores(count: int) -> None:
    """Keep this process on `count` of its cores; JAX must not have started yet."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def in_fresh_processes(function: Callable[[Any], Any], argument: Any, count: int) -> list[Any]:
    """`count` results of `function(argument)`, each of a new process, one after the other.

    There glibc takes memory in huge pages, unless the variable GLIBC_TUNABLES says else. By default each call with
    temporaries of more than 32 MB pays for thousands of fresh pages, or not, as other buffers come and go: noise of the
    size of what is to be measured.
    """
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    new = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, new, max_tasks_per_child=1) as processes:
        return list(processes.map(function, [argument] * count))


def device_name() -> str:
    """A short name of the device for files: `cpu`, or for example `nvidia-h200`."""
    return jax.devices()[0].device_kind.lower().replace(" ", "-")


def circumstances(packages: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to judge figures: the command, the date, the machine and the versions."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = getattr(sys.modules["__main__"], "__spec__", None)
    return {
        "command": shlex.join(["python", "-m", command.name, *sys.argv[1:]] if command else sys.argv),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": cores(),
        "memory": os.environ.get("GLIBC_TUNABLES", ""),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    """The model of the processor, and the widest vectors it has where Linux tells."""
    facts = pathlib.Path("/proc/cpuinfo")
    if not facts.exists():
        return platform.processor() or platform.machine()
    lines = [line.split(":", 1) for line in facts.read_text().splitlines() if ":" in line]
    found = {name.strip(): value.strip() for name, value in lines}
    vectors = next((name for name in ("avx512f", "avx2") if name in found.get("flags", "").split()), None)
    return ", ".join(filter(None, [found.get("model name", platform.machine()), vectors]))
