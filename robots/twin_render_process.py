"""The process that renders the twin's cameras, so that rendering never delays its motion."""

from __future__ import annotations

import argparse
import select
import sys
import time

from envs.aloha_physics import AlohaSim
from envs.errors import EnvError
from robots.sensor_memory import SensorMemory
from robots.twin_config import JOINTS, TwinConfig
from transport.child_process import die_with_parent, send_event

IDLE_S = 0.02
"""While no client reads cameras: how often to check for one."""


def render_until_stdin_ends(sim: AlohaSim, sensor_memory: SensorMemory, config: TwinConfig) -> None:
    """Render the newest state by every camera, once per period, on absolute deadlines.

    An image's stamp is that of the state in it. The same state is not rendered twice.
    """
    period_ns = round(1e9 / config.camera_hz)
    due_ns = time.monotonic_ns()
    rendered_ns = -1
    writers = {name: sensor_memory.camera_writer(name) for name in config.cameras}
    while True:
        needed = sensor_memory.camera_clients.load() > 0
        wait_s = max(0, due_ns - time.monotonic_ns()) / 1e9 if needed else IDLE_S
        if select.select([sys.stdin], [], [], wait_s)[0]:
            return
        if not needed:
            due_ns = time.monotonic_ns()
            continue
        if time.monotonic_ns() < due_ns:
            continue
        state = sensor_memory.joints.newest()
        if state is not None and state.stamp_ns != rendered_ns:
            rendered_ns = state.stamp_ns
            for name, camera in config.cameras.items():
                slot = writers[name].claim()
                sim.render_camera(
                    camera.camera, hw=camera.hw, out=slot["image"], qpos=state.arrays["qpos"]
                )
                slot["stamp_ns"][...] = rendered_ns
                slot["received_ns"][...] = time.monotonic_ns()
                writers[name].publish()
        now_ns = time.monotonic_ns()
        # Images that could not be rendered in time are skipped.
        due_ns += max(1, -(-(now_ns - due_ns) // period_ns)) * period_ns


def main(arguments: list[str] | None = None) -> None:
    """Run the process; started by ``robots.twin_owner_process``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--memory_fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    die_with_parent(options.parent)
    config = TwinConfig.from_json(options.config)
    try:
        with AlohaSim(
            config.task, max_hw=config.max_hw, shadows=config.shadows, msaa=config.msaa
        ) as sim:
            for camera in config.cameras.values():
                sim.render_camera(camera.camera, hw=camera.hw)
            sensor_memory = SensorMemory(
                options.memory_fd,
                qpos=sim.model.nq,
                joints=len(JOINTS),
                cameras=config.camera_hw,
                writable=True,
            )
            send_event("ready")
            render_until_stdin_ends(sim, sensor_memory, config)
    except EnvError as error:
        send_event("failed", error=str(error))


if __name__ == "__main__":
    main()
