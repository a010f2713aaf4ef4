"""A dataset on disk: its folder, its records by number, splits, mixtures and shards."""
