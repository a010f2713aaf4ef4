"""From a policy to completions."""
