"""Pure functions with papers behind them: tensors in, new tensors out, no state, no draws but at an address.

mixtures    a client's data as class-conditional Gaussian mixtures, with a disclosure floor
transport   exact optimal transport between masses
atoms       the components of many mixtures side by side
distances   between clients: optimal transport between their mixtures
nearest     of very many clients, those whose mixtures are nearest
known       what a server knows of such distances, brought up to date
cka         linear centred kernel alignment between r × r cores
neighbours  the most alike of many clients, and averages over them
lowrank     products of thin factors: SVD, truncation, norm and sum without the dense matrix
weights     distances and similarities -> a row of averaging weights for every client
"""
