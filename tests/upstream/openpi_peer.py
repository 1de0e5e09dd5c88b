"""openpi's own server file, run as it is: ``openpi_peer.py SOURCE PORT toy|drive``."""

import importlib.util
import pathlib
import sys

import foreign_model


class Toy:
    def infer(self, observation: dict) -> dict:
        image = observation["images"]["cam_high"].transpose(1, 2, 0)
        return {"actions": foreign_model.toy(image, observation["state"])}


class Drive:
    def infer(self, observation: dict) -> dict:
        return {"actions": foreign_model.drive(observation["state"])}


def main(source: str, port: str, model: str) -> None:
    path = pathlib.Path(source) / "src/openpi/serving/websocket_policy_server.py"
    spec = importlib.util.spec_from_file_location("websocket_policy_server", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    policy = {"toy": Toy, "drive": Drive}[model]()
    module.WebsocketPolicyServer(policy, "127.0.0.1", int(port), {"model": model}).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
