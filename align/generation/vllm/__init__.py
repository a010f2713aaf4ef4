"""vLLM as the engine: a server of the policy in an environment and a process of its own."""
