"""The federated core: what an algorithm is, what a client is, and the loop. Knows torch, and no model library."""
