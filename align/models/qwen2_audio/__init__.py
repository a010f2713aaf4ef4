"""Qwen2-Audio itself: checkpoints, processor, tokens per clip, the packed backbone, export."""
