"""Loads the policy of ``-m openpi://HOST:PORT`` and ``-m groot://HOST:PORT``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from policies.errors import ContractMismatch, PolicyError
from policies.yaml_config import InvalidConfig, load_config
from runtime.options.api_keys import ApiKeys
from runtime.options.model_name import UpstreamModel
from runtime.options.upstream import UpstreamOptions
from runtime.upstream.contract import UpstreamContract
from runtime.upstream.upstream_policy import UpstreamPolicy

SERVERS = {
    "openpi": ("runtime.upstream.openpi", "OpenpiServer"),
    "groot": ("runtime.upstream.groot", "GrootServer"),
}
"""System: (module, class) of its ``UpstreamServer``. Only the chosen module is imported."""


def load_upstream(model: UpstreamModel, options: UpstreamOptions) -> UpstreamPolicy:
    """Return the policy that ``model`` computes, connected; one inference has succeeded.

    Raises:
        PolicyError: The contract's file or the key's cannot be used, a package is missing, or the
            server does not answer, refuses us, or does not fit the contract.
    """
    try:
        given = load_config(UpstreamContract, options.contract, kind="upstream")
        key = ApiKeys(Path(options.api_key)).only() if options.api_key else ""
    except (InvalidConfig, ContractMismatch) as error:
        raise PolicyError(f"--upstream_contract: {error}") from error
    except (OSError, ValueError) as error:
        raise PolicyError(f"--api_key: {error}") from error
    module, name = SERVERS[model.system]
    try:
        make: Any = getattr(import_module(module), name)
    except ImportError as missing:
        raise PolicyError(f"{model}: {missing} (pip install '.[gateway]')") from missing
    contract = given.policy_contract(model.system)
    try:
        server = make(model, given, contract, options.timeout_s, key)
    except InvalidConfig as error:
        raise PolicyError(f"--upstream_contract: {options.contract}: {error}") from error
    policy = UpstreamPolicy(server, contract)
    try:
        policy.start()
    except BaseException:
        policy.close()
        raise
    return policy
