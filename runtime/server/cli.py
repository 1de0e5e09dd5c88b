"""The policy server's command line: ``python -m runtime.server`` and ``start_policy_server.py``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import ipaddress
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from policies.command_line import CommandLine, Number
from policies.errors import PolicyError
from policies.number_ranges import COUNT, DURATION_S_OR_NONE, PORT_OR_ANY, RATE_HZ_OR_ANY, Range
from policies.standard_streams import run_command
from policies.yaml_config import ConfigError, load_config
from runtime.errors import ModelNameError
from runtime.options import execution as strategy_options
from runtime.options.checkpoint import add_flags, from_flags
from runtime.options.defaults import DEFAULT_CHECKPOINT, TRANSPORTS
from runtime.options.model import LocalModel, read_model_name
from runtime.server.admin_token import AdminToken
from runtime.server.config import BATCH_WAIT_MS, ServerConfig
from runtime.server.model import close
from runtime.server.model_reload import ModelReloader
from runtime.server.policy_server import PolicyServer
from runtime.server.warmup import measure_costs, warm_up
from runtime.stats import Percentiles
from runtime.trace import recorder as trace
from runtime.trace.buffer import TraceError
from transport.address import format_address
from transport.child_process import take_stdin, write_event
from transport.errors import TransportError
from transport.zeromq.curve import KeyFileError
from transport.zeromq.malloc import keep_freed_memory

logger = logging.getLogger(__name__)

BAD_INPUT, INTERRUPTED = 2, 130
DESCRIPTOR = Range(3, 1_048_576)
FLAGS = (
    "model_name_or_path",
    "host",
    "port",
    "transport",
    "max_sessions",
    "max_batch",
    "batch_wait_ms",
    "session_timeout_s",
    "curve_key",
    "curve_allow",
    "metrics_port",
)
"""Those that are keys of the configuration, too."""


def parser() -> argparse.ArgumentParser:
    cli = CommandLine(
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
    add("-p", "--port", type=Number(int, PORT_OR_ANY), help="0 takes a free one (5000)")
    add("--transport", choices=TRANSPORTS, help="what clients are offered (auto: both)")
    add("--max_sessions", type=Number(int, COUNT), help="clients at a time (64)")
    add(
        "--max_batch",
        type=Number(int, COUNT),
        help="observations computed together (all the model can)",
    )
    add(
        "--batch_wait_ms",
        type=Number(float, BATCH_WAIT_MS),
        help="how long a simulation waits for partners (0)",
    )
    add(
        "--session_timeout_s",
        type=Number(float, DURATION_S_OR_NONE),
        help="end who has said nothing for so long (0: never)",
    )
    add(
        "--max_rate_hz",
        type=Number(float, RATE_HZ_OR_ANY),
        help="requests per second of one session (0: any)",
    )
    add("--curve_key", metavar="FILE", help="encrypt: the server's secret key (runtime.tools.keys)")
    add("--curve_allow", metavar="DIR", help="public keys of those who are let in")
    add("--insecure", action="store_true", help="no warning for lack of encryption")
    add(
        "--metrics_port",
        "--metrics-port",
        type=Number(int, PORT_OR_ANY),
        help="for Prometheus (0: none)",
    )
    add("--config", default="default", help="name under configs/server, or a YAML's path")
    add("--stop_with_stdin", action="store_true", help="stop when standard input closes")
    # For a program that starts the server: the address as JSON, on a pipe that it inherits.
    add("--ready_fd", type=Number(int, DESCRIPTOR), help=argparse.SUPPRESS)
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
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    if args.max_rate_hz is not None:
        given["limits"] = dataclasses.replace(config.limits, rate_hz=args.max_rate_hz)
    checkpoint = from_flags(args, config.checkpoint)
    return dataclasses.replace(config, checkpoint=checkpoint, **given), args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until SIGINT or SIGTERM. Returns the exit status."""
    try:
        config, args = read_config(argv)
    except (ConfigError, ValueError) as error:
        return _fail(error)
    if args.ready_fd is not None:
        try:
            os.set_inheritable(args.ready_fd, False)
        except OSError as error:
            return _fail(ValueError(f"--ready_fd: got {args.ready_fd}: {error.strerror}"))
    if args.stop_with_stdin:
        # A policy's code may ask: it must not read what tells of the parent's end.
        threading.Thread(target=_stop_at_end, args=(take_stdin(),), daemon=True).start()
    keep_freed_memory()
    logging.basicConfig(
        level=args.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        with trace.tracing(args.trace, "policy server"):
            return _serve(config, insecure=args.insecure, ready_fd=args.ready_fd)
    except TraceError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("interrupted before the server was ready", file=sys.stderr)
        return INTERRUPTED


def _serve(config: ServerConfig, *, insecure: bool, ready_fd: int | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the server is there
    try:
        model = read_model_name(config.model_name_or_path)
        if not isinstance(model, LocalModel):
            raise ModelNameError(f"-m {model}: got a server's address, expected a checkpoint")
        keys = config.keys()
        policy = config.checkpoint.load(model.name)
    except (PolicyError, ModelNameError, KeyFileError) as error:
        return _fail(error, _hint(config))
    try:
        warm = warm_up(policy)
        costs = measure_costs(policy, warm, config.max_batch)
        transports = ("shm", "zmq") if config.transport == "auto" else (config.transport,)
        with PolicyServer(
            policy,
            host=config.host,
            port=config.port,
            transports=transports,
            max_sessions=config.max_sessions,
            limits=config.limits,
            max_batch=config.max_batch,
            batch_wait_ms=config.batch_wait_ms,
            session_timeout_s=config.session_timeout_s,
            costs=costs,
            curve=keys,
        ) as server:
            _stop_on_signals(server)
            with _offices(server, config):
                _announce(server, config, transports, warm)
                if ready_fd is not None:
                    write_event(ready_fd, "ready", address=server.address)
                if keys is None and not insecure and not is_loopback(server.host):
                    _warn(server)
                server.serve()
                server.close()  # clients are told at once; what else ends may take its time
            policy = server.model.policy
    except (PolicyError, TransportError) as error:
        return _fail(error)
    finally:
        close(policy)
    logger.info("stopped; %s", server.statistics())
    return 0


@contextlib.contextmanager
def _offices(server: PolicyServer, config: ServerConfig) -> Iterator[None]:
    """What operators need: orders, and figures for Prometheus."""
    with contextlib.ExitStack() as stack:
        if config.metrics_port:
            try:
                from runtime.server.metrics import PATIENCE_S, serve_metrics
            except ImportError as error:
                raise TransportError(
                    f"--metrics_port: {error}: pip install prometheus_client"
                ) from error

            stack.callback(
                serve_metrics(
                    lambda: server.between(server.status, PATIENCE_S),
                    config.metrics_host,
                    config.metrics_port,
                )
            )
        token = None
        try:
            token = AdminToken(server.port)
            stack.callback(token.close)
        except OSError as error:
            logger.warning("orders only with an operator's key: %s", error)
        loader = ModelReloader(
            config.checkpoint.load,
            token,
            check=server.check_successor,
            swap=server.swap,
            call_in_serving_thread=server.between,
            max_batch=config.max_batch,
        )
        server.add_orders(loader.orders)
        stack.callback(loader.close)
        yield


def _stop_at_end(fd: int) -> None:
    """For a server that somebody's process started for itself: it must not outlive that."""
    while os.read(fd, 4096):
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
    server: PolicyServer, config: ServerConfig, transports: Sequence[str], warm: Percentiles
) -> None:
    policy, sizes = server.model.policy, server.model.sizes
    info, contract = policy.info, policy.contract
    cameras = ", ".join(f"{c.name} {c.source_hw[0]}x{c.source_hw[1]}" for c in contract.cameras)
    print(f"🚀 Policy Server started on {server.address}")
    print(f"   checkpoint   {info.checkpoint}{'' if info.trained else '  (UNTRAINED weights)'}")
    print(
        f"   policy       {contract.policy_type}, chunks of {contract.chunk_size}, data set "
        f"{contract.dataset_id or '-'} of {list(contract.dataset_ids)}"
    )
    print(f"   observation  {cameras or 'no cameras'}; state {contract.state_dim}")
    for line in strategy_options.say_before(contract, strategy_options.choose_execution(contract)):
        print(f"   {line}")
    threads = count(info.threads, "thread")
    print(f"   device       {info.device}, {info.precision}, {info.engine}, {threads}")
    secret = f"; CURVE, keys in {config.curve_allow}" if config.curve_key else ""
    print(f"   transports   {', '.join(transports)}{secret}")
    if sizes != (1,):
        print(f"   batches      of {', '.join(map(str, sizes))}")
    if config.metrics_port:
        metrics = format_address(config.metrics_host, config.metrics_port)
        print(f"   metrics      http://{metrics}/metrics")
    print(f"   warm latency {warm.in_ms()}", flush=True)


def _warn(server: PolicyServer) -> None:
    logger.warning(
        "NO ENCRYPTION, NO KEYS on %s: anybody who reaches port %d can use this policy, and "
        "whoever is in between can read and change what a robot is told. Make keys with "
        "`metronome keys`, give --curve_key and --curve_allow; --insecure silences this",
        server.host,
        server.port,
    )


def count(number: int, noun: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def is_loopback(host: str) -> bool:
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
    raise SystemExit(run_command(main))
