"""From people's judgements to preference pairs: agreement, annotator quality, pairs."""
