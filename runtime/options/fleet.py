"""The flags of an evaluation on a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from policies.flag_builder import Flag
from policies.number_ranges import PROCESSES, Range, check_ranges

RUNNING_OR_LOCAL = "auto"
"""``--ray`` without an address: the cluster that runs on this machine, else one of its own."""
CPUS = Range(0, 1024, above=True)
GPUS = Range(0, 64)


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """Where an evaluation's worlds and policy servers run.

    Raises:
        ValueError: A value is out of range, or one needs another that is not given.
    """

    ray: Annotated[
        str | None,
        Flag(
            "run the worlds on the Ray cluster at ADDRESS (HOST:PORT), from one of its machines",
            const=RUNNING_OR_LOCAL,
            default="no Ray; without a value the running cluster, else a local one",
            metavar="ADDRESS",
        ),
    ] = None
    env_cpus: Annotated[
        float, CPUS, Flag("with --ray: CPUs that each world reserves; a fraction is possible")
    ] = 1.0
    servers: Annotated[
        int | None,
        PROCESSES,
        Flag(
            "with --ray: policy servers to start", default="the policy is in each world's process"
        ),
    ] = None
    server_gpus: Annotated[
        float, GPUS, Flag("with --servers: GPUs that each server reserves; a fraction is possible")
    ] = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.ray is None and (self.servers is not None or self.env_cpus != 1.0):
            raise ValueError("--servers, --env_cpus: got one without --ray, expected both")
        if self.server_gpus and self.servers is None:
            raise ValueError("--server_gpus: got it without --servers, expected both")
