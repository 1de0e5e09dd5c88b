"""What of a result is the same whenever, wherever and in however many parts it is computed.

The other fields measure time, or say how the episodes were run. This is the one place that tells
them apart: two evaluations of a deterministic policy in lockstep are equal in what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HOW_CONFIG = (
    "model_name_or_path",
    "num_envs",
    "output_dir",
    "resume",
    "retries",
    "episode_timeout_s",
    "connection.transport",
    "connection.server_key",
    "connection.client_key",
    "upstream.timeout_s",
    "upstream.api_key",
    "fleet",
    "use_spawn",
    "trace",
    "live_view",
    "log_level",
)
"""Fields of ``config`` on which no episode depends. The policy is described under ``policy``."""
HOW_RUN = ("transport", "transport_reason", "fleet")
"""Fields of a result that say how the policy was reached."""
DURATIONS = ("request", "lateness")
"""Measured durations under ``timing``, beside those of ``stages``; only their counts repeat."""


def repeatable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a result's ``config`` on which the episodes depend, by dotted name."""
    flat = flattened(config)
    return {
        name: value
        for name, value in flat.items()
        if not any(name == how or name.startswith(f"{how}.") for how in HOW_CONFIG)
    }


def repeatable_fields(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result of ``eval-sim`` in lockstep without what measures time or says how it ran."""
    timing = dict(result["timing"])
    stages = {name: values["count"] for name, values in timing.pop("stages").items()}
    counts = {name: timing.pop(name)["count"] for name in DURATIONS}
    return {
        **{name: value for name, value in result.items() if name not in HOW_RUN},
        "config": repeatable_config(result["config"]),
        "episodes": [
            {name: value for name, value in episode.items() if name != "wall_s"}
            for episode in result["episodes"]
        ],
        "timing": {**timing, **counts, "stages": stages},
    }


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
