"""A policy behind OpenAI's HTTP interface: chats about clips, and transcripts."""
