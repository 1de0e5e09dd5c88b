"""``make demo``: start a server and evaluate it in two episodes of ALOHA."""

from __future__ import annotations

import sys
from pathlib import Path

from policies.standard_streams import run_command
from runtime.errors import RuntimeFault
from runtime.eval_sim import cli as eval_sim
from runtime.options.defaults import DEFAULT_CHECKPOINT
from runtime.server.server_process import ServerProcess

UNTRAINED = "outputs/untrained_act"
EPISODES = 2


def main() -> int:
    """Run the demo. Returns the exit status."""
    checkpoint = DEFAULT_CHECKPOINT
    if not Path(checkpoint).exists():
        from policies.checkpoint.untrained import make_untrained

        print(f"{checkpoint} does not exist: the demo uses untrained weights")
        make_untrained(Path(UNTRAINED), task="sim_transfer_cube")
        checkpoint = UNTRAINED
    print(f"$ metronome serve -m {checkpoint}", flush=True)
    try:
        with ServerProcess(["-m", checkpoint]) as server:
            command = ["-m", server.address, "-e", "aloha", "--num_rollout", str(EPISODES)]
            print(f"$ metronome eval-sim {' '.join(command)}", flush=True)
            return eval_sim.main([*command, "-o", "results/demo"])
    except RuntimeFault as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(run_command(main))
