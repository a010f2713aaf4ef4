"""From judgements to preference pairs and labels: votes, agreement, rules about annotators, evidence."""
