"""Installs the client; the extras add the model, the simulator, training, the checks."""

from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

PACKAGES = ("runtime", "transport", "policies", "envs", "robots")
OPS = ["prometheus_client>=0.20", "rich>=13"]
SERVER = ["torch>=2.9", "safetensors>=0.4", "openvino>=2025.0", *OPS]
# What compares results; also runs beside a robot, without a simulator.
COMPARE = ["scipy>=1.11", "matplotlib>=3.8"]
HUB = ["huggingface_hub>=1.0"]
SIM = [
    "mujoco>=3.1,<3.9",
    "gymnasium>=1.0",
    "gym-aloha>=0.1.1",
    "av>=12",
    "tqdm>=4.60",
    *COMPARE,
]
TRAIN = ["h5py>=3.10"]
JPEG = ["simplejpeg>=1.8"]
# What ROS cameras send beside plain RGB: 4:2:2, Bayer and compressed pictures.
ROS = [*JPEG, "opencv-python-headless>=4.8"]
# Each protocol's own library: openpi and GR00T, openpi, LeRobot.
GATEWAY = ["msgpack>=1.0", "websockets>=17", "grpcio>=1.66"]
# Both write and read LeRobotDatasets: their tables, their videos and pictures.
DATASET = ["pyarrow>=17", "av>=12"]
# What a live view is shown or kept with: Rerun in the versions that LeRobot 0.4.4 takes, too.
RERUN = ["rerun-sdk>=0.26,<0.27", *JPEG]
# Evaluations on a cluster.
RAY = ["ray>=2.60"]
FUZZ = ["atheris>=2.3"]
DEV = [
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.6",
    "mypy>=1.11",
    "import-linter>=2",
    "types-PyYAML",
    "types-tqdm",
]

setup(
    name="metronome",
    version="0.1.0",
    description="A low-latency runtime that serves robot imitation-learning policies",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=[
        *find_packages(
            include=[
                f"{package}{suffix}"
                for package in ("runtime", "transport", "policies", "envs", "robots")
                for suffix in ("", ".*")
            ]
        ),
        # Data, found beside the packages by policies.yaml_config.
        *find_namespace_packages(include=["configs", "configs.*"]),
    ],
    package_data={"": ["*.yaml", "py.typed"]},
    entry_points={"console_scripts": ["metronome = runtime.__main__:console"]},
    install_requires=["numpy>=1.26", "numba>=0.59", "posix_ipc>=1.1", "pyzmq>=26", "pyyaml>=6"],
    extras_require={
        "server": SERVER,
        "ops": OPS,
        "sim": SIM,
        "compare": COMPARE,
        "hub": HUB,
        "train": TRAIN,
        "jpeg": JPEG,
        "ros": ROS,
        "gateway": GATEWAY,
        "dataset": DATASET,
        "rerun": RERUN,
        "ray": RAY,
        "fuzz": FUZZ,
        "dev": DEV + TRAIN + ROS + GATEWAY + COMPARE + HUB + DATASET + RERUN + RAY,
    },
)
