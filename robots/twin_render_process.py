"""The process that draws a twin's pictures, so that drawing never delays its motion."""

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
"""How soon after somebody began to look there are pictures."""


def draw_forever(sim: AlohaSim, sensor_memory: SensorMemory, config: TwinConfig) -> None:
    """Until stdin ends: every camera once per period, of the newest state, on absolute deadlines.

    A picture's stamp is that of the state it shows; a state already shown is not drawn again.
    """
    period_ns = round(1e9 / config.camera_hz)
    due_ns = time.monotonic_ns()
    shown_ns = -1
    writers = {name: sensor_memory.camera_writer(name) for name in config.cameras}
    while True:
        watched = sensor_memory.watchers.load() > 0
        wait_s = max(0, due_ns - time.monotonic_ns()) / 1e9 if watched else IDLE_S
        if select.select([sys.stdin], [], [], wait_s)[0]:
            return
        if not watched:
            due_ns = time.monotonic_ns()
            continue
        if time.monotonic_ns() < due_ns:
            continue
        state = sensor_memory.joints.newest()
        if state is not None and state.stamp_ns != shown_ns:
            shown_ns = state.stamp_ns
            for name, camera in config.cameras.items():
                picture = writers[name].claim()
                sim.render_camera(
                    camera.camera, hw=camera.hw, out=picture["image"], qpos=state.arrays["qpos"]
                )
                picture["stamp_ns"][...] = shown_ns
                picture["received_ns"][...] = time.monotonic_ns()
                writers[name].publish()
        now_ns = time.monotonic_ns()
        # Pictures that could not be drawn in time are left out, not drawn late.
        due_ns += max(1, -(-(now_ns - due_ns) // period_ns)) * period_ns


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--sensor_memory", type=int, required=True)
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
                options.sensor_memory,
                qpos=sim.model.nq,
                joints=len(JOINTS),
                cameras=config.camera_hw,
                writable=True,
            )
            send_event("ready")
            draw_forever(sim, sensor_memory, config)
    except EnvError as error:
        send_event("failed", error=str(error))


if __name__ == "__main__":
    main()
