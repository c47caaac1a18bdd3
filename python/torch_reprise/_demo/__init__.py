"""The demo: a small GPT trained with and without checkpointing, compared bit for bit.

``data`` finds the text, ``model`` is the network, ``run`` trains and compares, ``plot`` draws.
"""
