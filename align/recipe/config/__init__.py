"""The keys of every kind of stage, typed and bounded. Imports no torch, so a recipe is checked in a blink."""
