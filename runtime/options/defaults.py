"""Defaults that several commands share."""

from __future__ import annotations

DEFAULT_CHECKPOINT = "ckpt/act_sim_transfer_cube_scripted_zscore_example"
DEFAULT_PORT = 5000
TRANSPORTS = ("auto", "shm", "zmq")
