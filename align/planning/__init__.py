"""What a recipe will cost before it runs: parameters, memory, hours. Imports no torch."""
