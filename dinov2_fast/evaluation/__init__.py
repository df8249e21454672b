"""How well features tell classes apart: k-NN and linear probes."""
