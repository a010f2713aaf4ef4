"""Qwen2-Audio: building, loading, audio tokens."""
