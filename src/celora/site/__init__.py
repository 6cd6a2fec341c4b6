"""A site: its policy, its ledger, its state, its keys."""
