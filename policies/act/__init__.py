"""Action Chunking with Transformers (Zhao et al. 2023), inference and training."""
