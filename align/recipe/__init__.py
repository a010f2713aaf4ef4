"""What a recipe says: typed configs, YAML with line numbers, cross-checks. Imports no torch."""
