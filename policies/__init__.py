"""What a policy is, and ACT: types, normalizers, the network, the checkpoint loaders."""
