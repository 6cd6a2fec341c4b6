"""FedAvg of LoRA on a causal language model: a Flower app."""
