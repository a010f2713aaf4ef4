"""What is asked next, and from judgements to preference pairs: agreement, annotator quality, pairs."""
