"""How annotators see and judge completions: completions in, annotations out."""
