"""The policy server's command line: ``python -m runtime.server`` and ``start_policy_server.py``."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from policies.errors import PolicyError
from policies.types import Policy
from policies.yaml_config import ConfigError, load_config
from runtime import trace
from runtime.checkpoint_options import add_flags, from_flags
from runtime.config import DEFAULT_CHECKPOINT, TRANSPORTS, ServerConfig
from runtime.errors import ModelNameError
from runtime.latency import Percentiles
from runtime.model_name import LocalModel, read_model_name
from runtime.server import PolicyServer
from runtime.warmup import warm_up
from transport.errors import TransportError

logger = logging.getLogger(__name__)

BAD_INPUT, INTERRUPTED = 2, 130


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(
        prog="python -m runtime.server",
        description="Serve a policy: observations in, chunks of future actions out.",
    )
    add = cli.add_argument
    add(
        "-m",
        "--model_name_or_path",
        help=f"checkpoint, or python:MODULE:FACTORY ({DEFAULT_CHECKPOINT})",
    )
    add("--host", help="where to listen (127.0.0.1)")
    add("-p", "--port", type=int, help="0 takes a free one (5000)")
    add("--transport", choices=TRANSPORTS, help="what clients are offered (auto: both)")
    add("--max_sessions", type=int, help="clients at a time (64)")
    add("--config", default="default", help="name under configs/server, or a YAML's path")
    add("--stop_with_stdin", action="store_true", help="stop when standard input closes")
    add("--trace", type=Path, metavar="FILE", help="what happened when, for ui.perfetto.dev")
    add_flags(cli)
    add("--log_level", default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    return cli


def read_config(argv: Sequence[str] | None) -> tuple[ServerConfig, argparse.Namespace]:
    """The configuration that file and flags make together, and the flags.

    Raises:
        ConfigError, ValueError: The file or a flag says something that cannot be.
    """
    args = parser().parse_args(argv)
    config = load_config(ServerConfig, args.config, kind="server")
    names = ("model_name_or_path", "host", "port", "transport", "max_sessions")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    checkpoint = from_flags(args, config.checkpoint)
    return dataclasses.replace(config, checkpoint=checkpoint, **given), args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until SIGINT or SIGTERM. Returns the exit status."""
    try:
        config, args = read_config(argv)
    except (ConfigError, ValueError) as error:
        return _fail(error)
    if args.stop_with_stdin:
        threading.Thread(target=_stop_at_end_of_stdin, daemon=True).start()
    logging.basicConfig(
        level=args.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        with trace.tracing(args.trace, "policy server"):
            return _serve(config)
    except trace.TraceError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("interrupted before the server was ready", file=sys.stderr)
        return INTERRUPTED


def _serve(config: ServerConfig) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the server is there
    try:
        model = read_model_name(config.model_name_or_path)
        if not isinstance(model, LocalModel):
            raise ModelNameError(f"-m {model}: got a server's address, expected a checkpoint")
        policy = config.checkpoint.load(model.name)
    except (PolicyError, ModelNameError) as error:
        return _fail(error, _hint(config))
    try:
        warm = warm_up(policy)
        transports = ("shm", "zmq") if config.transport == "auto" else (config.transport,)
        with PolicyServer(
            policy,
            host=config.host,
            port=config.port,
            transports=transports,
            max_sessions=config.max_sessions,
        ) as server:
            _stop_on_signals(server)
            _announce(server, policy, transports, warm)
            server.serve()
    except (PolicyError, TransportError) as error:
        return _fail(error)
    finally:
        _close(policy)
    logger.info("stopped; %s", server.statistics())
    return 0


def _close(policy: Policy) -> None:
    try:
        policy.close()
    except Exception:  # anyone's policy; there is nothing left to lose
        logger.exception("the policy failed to close")


def _stop_at_end_of_stdin() -> None:
    """For a server that somebody's process started for itself: it must not outlive that."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _stop_on_signals(server: PolicyServer) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number,
            lambda received, _: server.stop(
                f"the server is shutting down ({signal.Signals(received).name})"
            ),
        )


def _announce(
    server: PolicyServer, policy: Policy, transports: Sequence[str], warm: Percentiles
) -> None:
    info, contract = policy.info, policy.contract
    cameras = ", ".join(f"{c.name} {c.source_hw[0]}x{c.source_hw[1]}" for c in contract.cameras)
    print(f"🚀 Policy Server started on {server.host}:{server.port}")
    print(f"   checkpoint   {info.checkpoint}{'' if info.trained else '  (UNTRAINED weights)'}")
    print(
        f"   policy       {contract.policy_type}, chunks of {contract.chunk_size}, data set "
        f"{contract.dataset_id or '-'} of {list(contract.dataset_ids)}"
    )
    print(f"   observation  {cameras or 'no cameras'}; state {contract.state_dim}")
    print(f"   device       {info.device}, {info.precision}, {info.engine}, {info.threads} threads")
    print(f"   transports   {', '.join(transports)}")
    print(f"   warm latency {warm.in_ms()}", flush=True)
    if not _is_loopback(server.host):
        logger.warning(
            "listening on %s without encryption or keys: anybody who reaches port %d can use "
            "this policy",
            server.host,
            server.port,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hint(config: ServerConfig) -> str:
    if config.model_name_or_path == DEFAULT_CHECKPOINT and not Path(DEFAULT_CHECKPOINT).exists():
        return "the example checkpoint is not here: run from the repository's root, or `make demo`"
    return ""


def _fail(error: Exception, hint: str = "") -> int:
    print(f"error: {error}" + (f"\n       {hint}" if hint else ""), file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    raise SystemExit(main())
