"""Prompts of pre-training: tasks, in sentences or in Qwen-Audio's tags, and time stamps."""
