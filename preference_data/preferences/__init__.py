"""What is asked next, snapshots of what came back, and pairs and labels of it: votes, agreement, rules."""
