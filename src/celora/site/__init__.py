"""What happens at a site, and what may leave it: its policy, its filters, its ledger, what it keeps."""
