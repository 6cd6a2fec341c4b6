"""The frozen backbone, its adapters and what trains on them; nothing else imports transformers or peft.

settings             what a user sets; importing it imports no model library
loader               which models the clients of an experiment have
loading, targets     where a backbone comes from, and what can be adapted in it
backbone, slots      a frozen transformer whose adapters are handed in for one pass
activation_cache     what enters its first adapted layer, computed once for each row
batching, rows       which rows go together in a pass
inputs, image_processor  token ids and pixels, made when they are first needed
learner, families    a client's rows before a network; where its adapter starts
shared_backbone, model_zoo, private_model, protocol     one network for all clients, or one for each
export               adapters for people and other programs
"""
