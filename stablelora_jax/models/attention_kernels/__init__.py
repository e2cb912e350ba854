"""Attention for long rows: blockwise in plain XLA, cuDNN on NVIDIA GPUs, splash on TPUs."""
