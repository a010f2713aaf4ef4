"""What a run leaves: artifacts on disk, MLflow tracking, progress."""
