"""The options of a model that another system's server computes, ``-m openpi://HOST:PORT``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from policies.flag_builder import Flag
from policies.number_ranges import DURATION_S, check_ranges
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.model_name import SYSTEMS, Model, UpstreamModel


@dataclass(frozen=True, slots=True)
class UpstreamOptions:
    """How another system's server is used as a policy.

    Attributes:
        contract: A name or a file for ``runtime.upstream.contract.UpstreamContract``.
        timeout_s: Seconds for one answer. The first one may take longer: a model is compiled then.
        api_key: A file with one key.

    Raises:
        ValueError: A value is out of range.
    """

    contract: Annotated[
        str,
        Flag(
            "what the model of another system's server needs and returns: name under "
            "configs/upstream, or a YAML file",
            name="upstream_contract",
            metavar="FILE",
        ),
    ] = ""
    timeout_s: Annotated[
        float, DURATION_S, Flag("seconds to wait for its answer", name="upstream_timeout_s")
    ] = 10.0
    api_key: Annotated[
        str, Flag("file of the key that its server wants", name="api_key", metavar="FILE")
    ] = ""

    def __post_init__(self) -> None:
        check_ranges(self)

    def to_argv(self) -> list[str]:
        """Return command-line arguments that give the same options."""
        words = ["--upstream_timeout_s", str(self.timeout_s)]
        for name, value in (("upstream_contract", self.contract), ("api_key", self.api_key)):
            words += [f"--{name}", value] if value else []
        return words


def check_upstream(model: Model, upstream: UpstreamOptions, checkpoint: CheckpointOptions) -> None:
    """Check that the options are those that ``model`` needs.

    Raises:
        ValueError: ``model`` is another system's and has no contract or has options of a
            checkpoint, or it is not and has options of one.
    """
    if not isinstance(model, UpstreamModel):
        if upstream != UpstreamOptions():
            raise ValueError(
                "--upstream_contract, --upstream_timeout_s, --api_key: got one of them with -m "
                f"{model}, expected none: they are for "
                f"-m {' and '.join(f'{system}://HOST:PORT' for system in SYSTEMS)}"
            )
        return
    if not upstream.contract:
        raise ValueError(
            f"--upstream_contract: got none, expected a YAML file that says what {model.name} "
            "needs and returns"
        )
    if given := checkpoint.given_flags():
        raise ValueError(
            f"{', '.join(given)}: got with -m {model.name}, expected none: they are for a "
            "checkpoint; the upstream's contract says chunk size and rate"
        )
