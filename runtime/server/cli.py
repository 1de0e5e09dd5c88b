"""``metronome serve``, also ``python -m runtime.server``: run a policy server.

Exit status: 0 stopped by a signal, 2 bad input, 3 the device was lost (a new process may work), 130
interrupted before the server was ready.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from policies.command_line import CommandLine
from policies.errors import DeviceLost, PolicyError
from policies.flag_builder import add_flags, flag_value, from_flags
from policies.standard_streams import run_command
from policies.yaml_config import InvalidConfig, load_config
from runtime.control import strategy_selection
from runtime.errors import ModelNameError
from runtime.latency_stats import Percentiles
from runtime.options.defaults import DEFAULT_CHECKPOINT
from runtime.options.model_name import ServerAddress, read_model_name
from runtime.options.upstream import check_upstream
from runtime.server.admin_token import AdminToken
from runtime.server.config import ServeCommand, ServerConfig
from runtime.server.gateway_processes import GatewayProcesses, RunningGateway, shared_flags
from runtime.server.loaded_model import close_policy
from runtime.server.model_loader import load_model
from runtime.server.model_reload import CLOSE_S, ModelReloader
from runtime.server.policy_server import PolicyServer
from runtime.server.warmup import measure_costs, warm_up
from runtime.trace import recorder as trace
from runtime.trace.buffer import TraceError
from transport.address import format_address, is_loopback
from transport.child_process import stop_with_stdin, write_event
from transport.errors import TransportError
from transport.zeromq.curve import KeyFileError
from transport.zeromq.malloc import keep_freed_memory

logger = logging.getLogger(__name__)

BAD_INPUT, DEVICE_LOST, INTERRUPTED = 2, 3, 130
EXIT_WITHIN_S = 1.0
"""From the loss of the device to the end of the process."""


def parser() -> argparse.ArgumentParser:
    """Return the parser, with one argument per flag of ``ServeCommand``."""
    cli = CommandLine(
        prog="metronome serve",
        description="Serve a policy: it gets observations and returns chunks of future actions.",
    )
    add_flags(cli, ServeCommand)
    return cli


def read_command(argv: Sequence[str] | None) -> ServeCommand:
    """Return the command line, applied to the configuration file that it names.

    Args:
        argv: The arguments; None for ``sys.argv``.

    Raises:
        InvalidConfig, ValueError: The file or a flag is invalid.
    """
    args = parser().parse_args(argv)
    name = flag_value(ServeCommand, "config", args)
    return from_flags(ServeCommand, args, server=load_config(ServerConfig, name, kind="server"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until SIGINT or SIGTERM. Returns the exit status.

    Ends the process with ``DEVICE_LOST`` if the policy loses its device.
    """
    try:
        command = read_command(argv)
    except (InvalidConfig, ValueError) as error:
        return _fail(error)
    if command.ready_fd is not None:
        try:
            os.set_inheritable(command.ready_fd, False)
        except OSError as error:
            return _fail(ValueError(f"--ready_fd: got {command.ready_fd}: {error.strerror}"))
    if command.stop_with_stdin:
        stop_with_stdin()
    keep_freed_memory()
    logging.basicConfig(
        level=command.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        with trace.tracing(command.trace, "policy server"):
            return _serve(
                command.server,
                insecure=command.insecure,
                ready_fd=command.ready_fd,
                log_level=command.log_level,
            )
    except TraceError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("interrupted before the server was ready", file=sys.stderr)
        return INTERRUPTED
    except DeviceLost as error:
        _exit_without_cleanup(error)


def _serve(
    config: ServerConfig, *, insecure: bool, ready_fd: int | None = None, log_level: str = "INFO"
) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the server exists
    try:
        model = read_model_name(config.model_name_or_path)
        if isinstance(model, ServerAddress):
            raise ModelNameError(f"-m {model}: got a server's address, expected a checkpoint")
        check_upstream(model, config.upstream, config.checkpoint)
        keys = config.keys()
        config.check_gateways()
        policy = load_model(model, config.checkpoint, config.upstream)
    except DeviceLost:
        raise
    except (InvalidConfig, PolicyError, ModelNameError, KeyFileError, ValueError) as error:
        return _fail(error, _hint(config))
    lost = False
    try:
        warm = warm_up(policy)
        costs = measure_costs(policy, warm, config.max_batch)
        with PolicyServer(
            policy,
            host=config.host,
            port=config.port,
            transports=config.transports,
            max_sessions=config.max_sessions,
            limits=config.limits,
            max_batch=config.max_batch,
            batch_wait_ms=config.batch_wait_ms,
            session_timeout_s=config.session_timeout_s,
            costs=costs,
            curve=keys,
        ) as server:
            _stop_on_signals(server)

            def announce(gateways: Sequence[RunningGateway]) -> None:
                _announce(server, config, warm, gateways)
                if ready_fd is not None:
                    addresses = [dataclasses.astuple(gateway) for gateway in gateways]
                    write_event(ready_fd, "ready", address=server.address, gateways=addresses)
                if keys is None and not insecure and not is_loopback(server.host):
                    _warn(server)

            with (
                _operator_services(server, config),
                GatewayProcesses(
                    config.gateways,
                    shared_flags(config, server.address, insecure=insecure, log_level=log_level),
                    on_ready=announce,
                    on_failure=server.stop,
                ) as gateways,
            ):
                _serve_until_stopped(server)
                server.close()  # clients learn it now; ending the services may take longer
            if gateways.failure:
                return _fail(TransportError(gateways.failure))
            policy = server.model.policy
    except DeviceLost:
        lost = True
        raise
    except (PolicyError, TransportError) as error:
        return _fail(error)
    finally:
        if not lost:  # else it may wait for the device for ever
            close_policy(policy)
    counts = dataclasses.asdict(server.statistics())
    logger.info("stopped; %s", ", ".join(f"{name} {value}" for name, value in counts.items()))
    return 0


def _serve_until_stopped(server: PolicyServer) -> None:
    try:
        server.serve()
    except DeviceLost:
        threading.Thread(target=_exit_late, name="exit", daemon=True).start()
        raise


def _exit_late() -> None:
    """Exit although the rest of the shutdown hangs: a supervisor waits for the end."""
    time.sleep(EXIT_WITHIN_S)
    os._exit(DEVICE_LOST)


def _exit_without_cleanup(error: DeviceLost) -> NoReturn:
    """Print the reason and end the process.

    The interpreter's own shutdown runs the destructors of the policy's objects. On a device that is
    lost they may hang or crash, and the exit status would be another. The address is already free,
    and the traceback of ``error`` still refers to the policy, so no destructor has run.
    """
    print(f"error: {error}", file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(DEVICE_LOST)


@contextlib.contextmanager
def _operator_services(server: PolicyServer, config: ServerConfig) -> Iterator[None]:
    """Run the admin commands and, if wanted, the Prometheus metrics, during a ``with`` block."""
    with contextlib.ExitStack() as stack:
        if config.metrics_port:
            try:
                from runtime.server.metrics import STATUS_TIMEOUT_S, serve_metrics
            except ImportError as error:
                raise TransportError(
                    f"--metrics_port: {error}: pip install prometheus_client"
                ) from error

            stack.callback(
                serve_metrics(
                    lambda: server.call_in_serving_thread(server.status, STATUS_TIMEOUT_S),
                    config.metrics_host,
                    config.metrics_port,
                )
            )
        token = None
        try:
            token = AdminToken(server.port)
            stack.callback(token.close)
        except OSError as error:
            logger.warning("admin commands need an operator's key: %s", error)
        loader = ModelReloader(
            config.checkpoint.load,
            token,
            check=server.check_successor,
            swap=server.swap,
            call_in_serving_thread=server.call_in_serving_thread,
            report_device_lost=server.report_device_lost,
            max_batch=config.max_batch,
        )
        server.add_admin_commands(loader.admin_commands)

        def close_loader(_: object, error: BaseException | None, __: object) -> None:
            # After a loss a load in progress may hang; its thread ends with the process.
            loader.close(0.0 if isinstance(error, DeviceLost) else CLOSE_S)

        stack.push(close_loader)
        yield


def _stop_on_signals(server: PolicyServer) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number,
            lambda received, _: server.stop(
                f"the server is shutting down ({signal.Signals(received).name})"
            ),
        )


def _announce(
    server: PolicyServer,
    config: ServerConfig,
    warm: Percentiles,
    gateways: Sequence[RunningGateway] = (),
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
    for line in strategy_selection.summary_lines(
        contract, strategy_selection.choose_execution(contract)
    ):
        print(f"   {line}")
    threads = count(info.threads, "thread")
    print(f"   device       {info.device}, {info.precision}, {info.engine}, {threads}")
    secret = f"; CURVE, keys in {config.curve_allow}" if config.curve_key else ""
    print(f"   transports   {', '.join(config.transports)}{secret}")
    for gateway in gateways:
        print(f"   gateway      {gateway.protocol} clients on {gateway.address}")
    if sizes != (1,):
        print(f"   batches      of {', '.join(map(str, sizes))}")
    if config.metrics_port:
        metrics = format_address(config.metrics_host, config.metrics_port)
        print(f"   metrics      http://{metrics}/metrics")
    print(f"   warm latency {warm.in_ms()}", flush=True)


def _warn(server: PolicyServer) -> None:
    logger.warning(
        "NO ENCRYPTION, NO KEYS on %s: every host that reaches port %d can use this policy, and "
        "every host on the network path can read and change the robot's commands. Make keys with "
        "`metronome keys`, give --curve_key and --curve_allow; --insecure silences this",
        server.host,
        server.port,
    )


def count(number: int, noun: str) -> str:
    """Return e.g. ``1 thread`` or ``2 threads``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _hint(config: ServerConfig) -> str:
    if config.model_name_or_path == DEFAULT_CHECKPOINT and not Path(DEFAULT_CHECKPOINT).exists():
        return "the example checkpoint is missing: run from the repository's root, or `make demo`"
    return ""


def _fail(error: Exception, hint: str = "") -> int:
    print(f"error: {error}" + (f"\n       {hint}" if hint else ""), file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    raise SystemExit(run_command(main))
