"""GR00T's own ``PolicyServer``, run as it is: ``groot_peer.py SOURCE PORT toy|drive``."""

import sys

import foreign_model
import numpy as np

KEYS = {"toy": ["left", "right"], "drive": ["base"]}


def policy_of(model: str) -> object:
    from gr00t.data.types import ModalityConfig
    from gr00t.policy.policy import BasePolicy

    class Policy(BasePolicy):
        def check_observation(self, observation: dict) -> None:
            language = observation["language"]["task"]
            assert isinstance(language[0][0], str), language
            for state in observation["state"].values():
                assert state.dtype == np.float32 and state.shape[:2] == (1, 1), state.shape
            for video in observation["video"].values():
                assert video.dtype == np.uint8 and video.shape[:2] == (1, 1), video.shape

        def check_action(self, action: dict) -> None:
            for value in action.values():
                assert value.dtype == np.float32 and value.shape[0] == 1, value.shape

        def _get_action(self, observation: dict, options: dict | None = None) -> tuple:
            state = np.concatenate([observation["state"][key][0, 0] for key in KEYS[model]])
            if model == "drive":
                return {"base": foreign_model.drive(state)[None]}, {}
            actions = foreign_model.toy(observation["video"]["front"][0, 0], state)[None]
            return {"left": actions[..., :7], "right": actions[..., 7:]}, {"seen": 1}

        def reset(self, options: dict | None = None) -> dict:
            return {}

        def get_modality_config(self) -> dict:
            rows, keys = {"toy": 10, "drive": 50}[model], KEYS[model]
            found = {
                "state": ModalityConfig(delta_indices=[0], modality_keys=keys),
                "action": ModalityConfig(
                    delta_indices=list(range(rows)), modality_keys=KEYS[model]
                ),
                "language": ModalityConfig(delta_indices=[0], modality_keys=["task"]),
            }
            if model == "toy":
                found["video"] = ModalityConfig(delta_indices=[0], modality_keys=["front"])
            return found

    return Policy()


def main(source: str, port: str, model: str) -> None:
    sys.path.insert(0, source)
    from gr00t.policy.server_client import PolicyServer

    PolicyServer(policy_of(model), host="127.0.0.1", port=int(port)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
