"""FedAvg of LoRA and head: a Flower app."""
