"""The experiments of Sander, Ablin and Peyré (NeurIPS 2022, arXiv:2205.14612), and ours beside them, in small.

Where a file says "the authors' code", it is their public repository michaelsdr/resnet_nodes.
"""
