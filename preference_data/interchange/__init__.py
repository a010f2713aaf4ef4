"""Pairs, labels and chats in the rows of TRL, LLaMA-Factory and ms-swift, in and out; multiple choice, in."""
