"""What is asked next, and from judgements to pairs and labels: votes, agreement, rules, evidence."""
