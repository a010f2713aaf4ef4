"""The verdict, the registry and the pages people decide on."""
