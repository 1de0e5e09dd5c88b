"""The gateway for the clients of NVIDIA Isaac GR00T: ZMQ and MessagePack."""
